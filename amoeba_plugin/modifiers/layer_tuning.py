"""AdaptiveLayerTuningModifier: windows of layers trained below exits, and the exits' votes, as a recipe step."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from llmcompressor.core import State
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, TrainingArguments

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.errors import ArtifactError, DataError, RecipeError
from amoeba_plugin.models.adapter import linear_names
from amoeba_plugin.models.compressed_linear import CompressedLinear, keep_packed
from amoeba_plugin.modifiers.layer_tuning_fields import ExitOptions
from amoeba_plugin.modifiers.one_for_all_fields import LORA_FIELDS, AdapterOptions, require_effect, require_schedule
from amoeba_plugin.modifiers.order import require_session_order
from amoeba_plugin.modifiers.selection import on_main_device
from amoeba_plugin.modifiers.trained import TrainedModifier
from amoeba_plugin.runtime.files import is_vacant, whole_or_nothing
from amoeba_plugin.runtime.model_files import copy_tokenizer
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.runtime.scratch import scratch_directory
from amoeba_plugin.runtime.units import BYTES, DURATIONS, quantity
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.files import BASE_NAME, fold
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.probing import PLAN_NAME, Planned, plan_training
from amoeba_plugin.training.layer_tuning.tune import tune_layers
from amoeba_plugin.training.layer_tuning.voting import Votes
from amoeba_plugin.training.layer_tuning.voting_model import VOTES_NAME, VotingModel
from amoeba_plugin.training.layer_tuning.windows import require_weights

logger = logging.getLogger(__name__)
NOT_OF_THE_TRAINING = {"tuned_dir"}  # fields that do not change what is trained
KEPT_STATES = "states"  # in checkpoint_dir


class Prepared(NamedTuple):
    """A model that is ready to be tuned."""

    tuned: PreTrainedModel | PeftModel
    exits: Exits
    training: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]


class AdaptiveLayerTuningModifier(TrainedModifier):
    """Tune a window of layers at a time below an exit, and let the exits vote (Edge-LLM, arXiv:2406.15758).

    Sample YAML::

        tune_stage:
          amoeba_tune_modifiers:
            AdaptiveLayerTuningModifier:
              exits: {depths: ["1/2", "3/4", "1"], vote: weighted}
              adapter: {type: lora, r: 16}
              max_steps: 1000
              tuned_dir: tuned

    In front of quantization, or without any, it works on the recipe's model, which leaves it as the deepest exit, an
    adapter folded in. Behind quantization it is a stage of its own, which ``amoeba run`` executes on the checkpoint
    that was saved: what it learned is an adapter, in ``tuned_dir``.

    Attributes:
        exits: See :class:`ExitOptions`.
        stacked: Layers below those of an exit compute as they were tuned for the exits below; false: as the base, so
            that exits do not disturb one another (reference code). Always so with ``adapter: none``. Default false.
        window: Layers trained below an exit. Default: down to the exit below it.
        policy: Which exit a phase trains: ``random``, ``cyclic``, or ``sequential``: once each, from below (reference
            code). Default ``random``.
        weights: How often each exit is drawn, from below; with ``sequential`` its share of the steps. Default: all
            alike.
        phase_steps: Optimizer steps between two draws. Default 1.
        keep_states: Keep the optimizer's states of layers that leave the window; false: memory holds those of one
            window. Default true.
        bottom_dtype: What layers below the window compute in: a dtype, ``same``, or ``auto``: bfloat16 where the
            machine has instructions for it. Default ``auto``.
        cache_gib: GiB of what comes out of these layers that are kept, in ``checkpoint_dir`` if there is one, so that
            the next epoch starts at the window; of stacked exits with ``policy: sequential``. Default 0.
        adapter: What is trained: a LoRA or SMOL, see :class:`AdapterOptions`, or ``none``: the layers' own parameters.
            Default: a LoRA of rank 16.
        dataset: Training text: a local file or a hub id. Default: the calibration data.
        dataset_split: Split of ``dataset``. Default ``train``.
        text_column: Column of ``dataset`` with the text. Default: ``text``, or the only column of strings.
        num_samples: Sequences taken from ``dataset``. Default 10,000.
        max_seq_length: Tokens per sequence of ``dataset``. Default 512.
        max_steps: Optimizer steps. Default 1,000.
        batch_size: Sequences per micro-batch. Default 1 (reference code).
        gradient_accumulation_steps: Micro-batches per step. Default 16 (reference code).
        learning_rate: AdamW's. Default 4e-4 (reference code).
        lr_scheduler_type: A schedule of transformers. Default ``constant`` (reference code).
        warmup_steps: Steps of linear warm-up; with ``constant`` there is none: ``constant_with_warmup``. Default 0.
        max_grad_norm: Gradient norm clipped to. Default 0.3 (reference code).
        gradient_checkpointing: Recompute activations of the window in the backward pass. Default false.
        memory: The most memory that the process may take, ``2GiB``: micro-batch, window (no more layers than asked
            for), checkpointing, and dtype and cache of the layers below the window, are then planned by a few steps
            that are measured; sequences of a step stay as they are. Default: nothing is planned.
        deadline: The most time that the training may take, ``20min``; planned like ``memory``. Default: none.
        seed: Of draws, initialisation and data order. Default 42.
        tuned_dir: Where to write what was tuned, with its exits and votes: an adapter, with its base in it unless
            that is quantized, or the whole model. Default: none is written.
        checkpoint_dir: Where to save the training while it runs. The same recipe started again goes on from the last
            checkpoint that is whole. Default: nothing is saved.
        save_steps: Optimizer steps between two such checkpoints; the last two are kept. Default 500.
    """

    exits: ExitOptions = Field(default_factory=ExitOptions)
    stacked: bool = False
    window: int | None = Field(default=None, ge=1)
    policy: str = "random"
    weights: list[float] = Field(default_factory=list)
    phase_steps: int = Field(default=1, ge=1)
    keep_states: bool = True
    bottom_dtype: str = "auto"
    cache_gib: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    adapter: AdapterOptions | Literal["none"] = AdapterOptions(type="lora", r=16, lora_alpha=32)
    max_steps: int = Field(default=1_000, ge=1)
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulation_steps: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=4e-4, gt=0, allow_inf_nan=False)
    tuned_dir: str | None = None
    memory: str | None = None
    deadline: str | None = None

    _planned: Planned | None = PrivateAttr(default=None)

    @field_validator("memory", "deadline")
    @classmethod
    def _limits_have_units(cls, limit: str | None, info: ValidationInfo) -> str | None:
        if limit is not None:
            quantity(limit, BYTES if info.field_name == "memory" else DURATIONS)
        return limit

    @model_validator(mode="after")
    def _can_run(self) -> AdaptiveLayerTuningModifier:
        """Refuse here, before anything loads, what the training would refuse later."""
        self.options().require_cache_is_read(len(self.exits.depths), self.is_stacked)
        require_schedule(self.lr_scheduler_type, self.warmup_steps)
        require_effect(self)
        require_weights(self.weights, len(self.exits.depths))
        return self

    @property
    def is_stacked(self) -> bool:
        """Whether exits are: the model's own parameters are there once."""
        return self.stacked or self.adapter == "none"

    def options(self) -> LayerTuningOptions:
        """Return what this recipe asks of the training."""
        on_disk = self.checkpoint_dir is not None and self.cache_gib > 0
        return LayerTuningOptions(
            self.window, self.policy, tuple(self.weights), self.phase_steps, self.keep_states, self.bottom_dtype,
            self.cache_gib, Path(self.checkpoint_dir or "") / KEPT_STATES if on_disk else None,
        )  # fmt: skip

    def require_fits(self, config: PretrainedConfig) -> None:
        """Refuse exits that a model has not.

        Raises:
            RecipeError: It says what is possible.
        """
        self.exits.of(config.num_hidden_layers)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Tune the recipe's model, which becomes its deepest exit; ``tuned_dir`` has all of them."""
        require_session_order(self)
        model = state.model
        self.require_fits(model.config)
        batches = materialise(state.data.calib, vocab_size=model.config.vocab_size)
        with on_main_device(model):
            tuned, exits, votes = self._tune(model, batches)
        if self.tuned_dir is not None and rank() == 0:
            with whole_or_nothing(Path(self.tuned_dir), replace=True) as partial:
                if isinstance(tuned, PeftModel):
                    tuned.save_pretrained(str(partial))
                    bare = copy.deepcopy(tuned).unload()
                    Exits(bare, exits.depths, exits.stacked).remove()
                    PreTrainedModel.save_pretrained(bare, partial / BASE_NAME)
                else:  # a host's override of save_pretrained compresses
                    PreTrainedModel.save_pretrained(model, partial)
                self._finish(partial, votes, str(exits.config.name_or_path))
        fold(tuned, exits, exits.depths[-1])
        exits.remove()
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Do nothing: it is all done."""
        return True

    def tune_checkpoint(self, checkpoint: Path, base: Path, batches: list[Batch]) -> None:
        """Tune a quantized checkpoint: what it learns is an adapter in ``tuned_dir``.

        Args:
            checkpoint: Of the quantized model.
            base: Where it will be.
            batches: Calibration data.

        Raises:
            ArtifactError: If ``tuned_dir`` holds something else.
        """
        assert self.tuned_dir is not None  # see require_runnable_behind
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        keep_packed(model)
        with on_main_device(model):
            tuned, _, votes = self._tune(model, batches)
        assert isinstance(tuned, PeftModel)
        with whole_or_nothing(Path(self.tuned_dir), replace=True) as partial:
            tuned.save_pretrained(str(partial))  # it looks at the base
            config = PeftConfig.from_pretrained(str(partial))
            config.base_model_name_or_path = str(base.resolve())
            config.save_pretrained(str(partial))
            self._finish(partial, votes, str(checkpoint))

    def require_runnable_behind(self) -> None:
        """Refuse what cannot be tuned behind a quantization.

        Raises:
            RecipeError: If there is no adapter, or no place for it.
        """
        if self.adapter == "none":
            raise RecipeError(
                "adapter: none behind quantization: quantized weights cannot be trained; give adapter: {type: lora}, "
                "or put this modifier in front of the quantization"
            )
        if self.tuned_dir is None:
            raise RecipeError("tuned_dir is missing: what is learned behind quantization is an adapter, and goes there")

    def _finish(self, directory: Path, votes: Votes, tokenizer_of: str) -> None:
        votes.save(directory / VOTES_NAME)
        if self._planned is not None:
            self._planned.save(directory / PLAN_NAME)
        copy_tokenizer(tokenizer_of, directory)

    def _prepared(self, model: PreTrainedModel, calibration: list[Batch]) -> Prepared:
        """Make the exits, put the adapter on, and keep back what votes are fitted on."""
        torch.manual_seed(self.seed)
        exits = Exits(model, self.exits.of(model.config.num_hidden_layers), self.is_stacked)
        tuned = self._attach(exits)
        rows = self.rows(str(model.config.name_or_path), model.config.vocab_size, calibration)
        kept_back = 0 if self.exits.vote == "none" else self.exits.held_out
        if len(rows) <= kept_back:
            raise DataError(
                f"{len(rows)} sequences, of which exits.held_out keeps {kept_back} for the votes: none is left to "
                "train on; give more text, or lower held_out"
            )
        training, held_out = rows[: len(rows) - kept_back], rows[len(rows) - kept_back :]
        self.tell_repetition(len(training))
        return Prepared(tuned, exits, training, held_out)

    def planned(
        self, model: PreTrainedModel, calibration: list[Batch], memory: str | None, deadline: str | None
    ) -> Planned:
        """Plan a training of a model, without training it; limits that are not given are those of the fields.

        Raises:
            BudgetError: If no plan keeps the limits.
        """
        prepared = self._prepared(model, calibration)
        limits = self.model_copy(update={"memory": memory or self.memory, "deadline": deadline or self.deadline})
        with on_main_device(model), scratch_directory() as directory:
            return limits._plan(prepared, self.options(), self.arguments(directory))

    def _tune(
        self, model: PreTrainedModel, calibration: list[Batch]
    ) -> tuple[PreTrainedModel | PeftModel, Exits, Votes]:
        prepared = self._prepared(model, calibration)
        tuned, exits, training, held_out = prepared
        rows = training + held_out
        of = {"model": str(model.config.name_or_path), "layers": len(exits.layers), "rows": len(rows)}
        with self.training_directory(of, NOT_OF_THE_TRAINING) as directory:
            options, arguments = self.options(), self.arguments(directory)
            if self.memory is None and self.deadline is None:
                tune_layers(tuned, exits, training, options, arguments)
            else:
                planned = Planned.kept_in(directory) or self._plan(prepared, options, arguments)
                planned.save(directory / PLAN_NAME)
                logger.info("planned: %s", planned.in_words)
                self._planned = planned.run(partial(tune_layers, tuned, exits, training), options, arguments)
                self._planned.save(directory / PLAN_NAME)
        tuned.eval()
        return tuned, exits, self._votes(tuned, exits, held_out)

    def _plan(self, prepared: Prepared, options: LayerTuningOptions, arguments: TrainingArguments) -> Planned:
        """Plan a training within the limits of the fields.

        Raises:
            BudgetError: If there is no such plan.
        """
        memory = None if self.memory is None else quantity(self.memory, BYTES)
        deadline = None if self.deadline is None else quantity(self.deadline, DURATIONS)
        return plan_training(
            prepared.tuned, prepared.exits, prepared.training, options, arguments, memory, deadline
        )  # fmt: skip

    def _votes(self, tuned: PreTrainedModel | PeftModel, exits: Exits, held_out: list[dict[str, Tensor]]) -> Votes:
        if self.exits.vote == "none":
            return Votes.alike(exits.depths[-1:])
        collate = PaddingCollator.of(exits.config)
        batches: list[Batch] = [collate([row]) for row in held_out]
        votes = VotingModel.fitted(tuned, exits, batches, self.exits.vote, self.exits.agreement).votes
        for depth, weight, temperature in zip(votes.depths, votes.weights, votes.temperatures, strict=True):
            logger.info("the exit at %d votes with weight %.3f, temperature %.2f", depth, weight, temperature)
        return votes

    def _attach(self, exits: Exits) -> PreTrainedModel | PeftModel:
        """Put the adapter on a model; a LoRA beside packed weights is one of SMOL's, for PEFT has none."""
        if self.adapter == "none":
            return exits.model
        settings = self.adapter.model_dump(exclude={"type"})
        settings["target_modules"] = self.adapter.target_modules or linear_names(exits.layers)
        settings |= {"modules_to_save": exits.modules_to_save or None, "task_type": "CAUSAL_LM"}
        packed = any(isinstance(module, CompressedLinear) for module in exits.model.modules())
        if self.adapter.type == "lora" and not packed:
            lora = {*LORA_FIELDS, "modules_to_save", "task_type"}
            return get_peft_model(exits.model, LoraConfig(**{key: settings[key] for key in settings if key in lora}))
        if self.adapter.type == "lora":
            settings |= {"num_experts": 1, "top_k": 1, "router_noise": False}
        return get_peft_model(exits.model, SmolConfig(**settings))


def require_tuned_replaceable(directory: Path) -> None:
    """Refuse to write a tuned model over anything but an older one.

    Raises:
        ArtifactError: If the directory holds something else.
    """
    if not is_vacant(directory) and not (directory / VOTES_NAME).is_file():
        raise ArtifactError(f"{directory} exists and is no tuned model; nothing is overwritten: name another directory")
