"""OneForAllDistillationModifier: an adapter, sandwich sampling and balanced in-place distillation, as a recipe step."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompressor.core import Event, EventType, State, active_session
from peft import LoraConfig, PeftModel
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.checkpoint import attach_smol, require_replaceable, save_elastic
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.adapter import linear_names
from amoeba_plugin.modifiers.external import ExternalSteps
from amoeba_plugin.modifiers.one_for_all_fields import LORA_FIELDS, AdapterOptions, require_effect, require_schedule
from amoeba_plugin.modifiers.order import extraction_follows, require_session_order
from amoeba_plugin.modifiers.selection import Selection, forget_selection, on_main_device, selection_for
from amoeba_plugin.modifiers.trained import TrainedModifier
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.step import StepHost, SubnetStep
from amoeba_plugin.training.one_for_all.strengths import fit_strengths
from amoeba_plugin.training.one_for_all.train import train_one_for_all

FEWEST = 4  # sequences that strengths are chosen by, unless fewer are asked for
NOT_OF_THE_TRAINING = {"elastic_dir", "conflict_every"}  # fields that do not change what is trained


class OneForAllDistillationModifier(TrainedModifier):
    """Train all shapes of the space at once (AmoebaLLM, arXiv:2411.10606, sections 4.2 and 4.3).

    Sample YAML::

        finetune_stage:
          amoeba_finetune_modifiers:
            OneForAllDistillationModifier:
              adapter: {r: 64, lora_alpha: 16, num_experts: 5, top_k: 2}
              max_steps: 10000
              elastic_dir: elastic

    Attributes:
        adapter: What is trained: SMOL or a plain LoRA, see :class:`AdapterOptions`, or ``none``: the model's own
            parameters. Default: SMOL.
        dataset: Training text: a local file or a hub id. Default: the calibration data.
        dataset_split: Split of ``dataset``. Default ``train``.
        text_column: Column of ``dataset`` with the text. Default: ``text``, or the only column of strings.
        num_samples: Sequences taken from ``dataset``. Default 10,000.
        max_seq_length: Tokens per sequence of ``dataset``. Default 512.
        max_steps: Optimizer steps; 0 trains nothing and keeps the selection alone. Default 10,000 (paper).
        batch_size: Sequences per micro-batch. Default 2 (reference code).
        gradient_accumulation_steps: Micro-batches per step, each with subnets of its own. Default 4 (reference code).
        learning_rate: AdamW's. Default 2e-4 (paper).
        lr_scheduler_type: A schedule of transformers. Default ``constant`` (paper).
        warmup_steps: Steps of linear warm-up; with ``constant`` there is none: ``constant_with_warmup``. Default 0.
        max_grad_norm: Gradient norm clipped to. Default 0.3 (reference code).
        train_largest: Also train the whole model, which teaches the others, on the labels. False leaves it the base
            model, bit for bit, and saves its backward pass: for text that the base already knows; SMOL only. Default
            true (paper).
        num_random: Random subnets between largest and smallest in each micro-batch. Default 2 (reference code).
        sampled_shapes: Shapes that the random ones are drawn from, depth and width together; ``all``: every shape;
            ``independent``: depth and width apart, the depth from all but the largest (reference code). Default
            ``all``.
        loss: ``soft_cross_entropy`` (reference code), or another of :mod:`amoeba_plugin.training.one_for_all.losses`.
        temperature: T softens teacher and student. Losses are not multiplied by T^2 (nor are the reference code's), so
            that their gradients shrink by about T^2; balancing would undo such a factor. Default 1.
        kd_weight: Weight of distillation against the labels for all but the largest subnet. Default 1.
        distill_all_tokens: Distil every position, not just those before a target token. Default false.
        distill_steps: Optimizer steps with distillation; after them all learn from the labels alone. Default: all.
        strength_rows: Sequences that are not trained on, the last ones, an eighth of all at most: they decide how much
            of the adapter every shape takes, between nothing and all of it, so that on them none ends worse than it
            began; SMOL only. 0, or where an eighth is less than 4 of them: all take all of it. Default 16.
        loss_balancing: Scale each subnet's gradient by loss of the largest / its loss. Default true.
        max_balance_ratio: The largest such ratio. Default 10.
        conflict_every: Optimizer steps between two measurements of the cosines between the subnets' gradients, which
            are logged; 0: never. Default 0.
        gradient_checkpointing: Recompute activations in the backward pass. Default false.
        seed: Of sampling, initialisation and data order. Default 42.
        elastic_dir: Where to write the elastic checkpoint. Default: none is written.
        checkpoint_dir: Where to save the training while it runs. The same recipe started again goes on from the last
            checkpoint that is whole. Default: nothing is saved.
        save_steps: Optimizer steps between two such checkpoints; the last two are kept. Default 500.
    """

    adapter: AdapterOptions | Literal["none"] = AdapterOptions()
    train_largest: bool = True
    num_random: int = Field(default=2, ge=0)
    sampled_shapes: list[str] | Literal["all", "independent"] = "all"  # a tuple has no place in plain YAML
    loss: str = "soft_cross_entropy"
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    kd_weight: float = Field(default=1.0, ge=0, le=1)
    distill_all_tokens: bool = False
    distill_steps: int | None = Field(default=None, ge=0)
    strength_rows: int = Field(default=16, ge=0)
    loss_balancing: bool = True
    max_balance_ratio: float = Field(default=10.0, gt=0)
    conflict_every: int = Field(default=0, ge=0)
    elastic_dir: str | None = None

    _external: ExternalSteps | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _only_smol_spares_the_largest(self) -> OneForAllDistillationModifier:
        if not self.train_largest and (self.adapter == "none" or self.adapter.type != "smol"):
            raise RecipeError(
                "train_largest: false wants SMOL, which alone can leave the whole model as it is: what a LoRA or the "
                "model's own weights learn for small shapes changes the teacher; set train_largest: true"
            )
        return self

    @model_validator(mode="after")
    def _can_run(self) -> OneForAllDistillationModifier:
        """Refuse here, before anything loads, what the training would refuse after the selection."""
        self.options()
        require_schedule(self.lr_scheduler_type, self.warmup_steps)
        require_effect(self)
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Prepare what is trained, train it, write the elastic checkpoint."""
        require_session_order(self)
        if self.elastic_dir is not None and rank() == 0:
            require_replaceable(Path(self.elastic_dir))
        selection = selection_for(state)
        elastic = selection.require_elastic(state.model)
        if state.data.train is not None or state.optimizer is not None:
            self._begin_external(selection, elastic)
            return True
        if self.max_steps:
            with selection.timed("one-for-all training"):
                selection.peft_model = self._train(elastic, selection.batches)
        self._save_elastic(elastic, selection.peft_model, self.max_steps > 0)
        if not extraction_follows(self):  # before the host's pipelines wrap the modules' forward methods
            _give_back(state.model)
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Take a step where an external trainer fires the events of a training.

        At LOSS_CALCULATED all subnets are differentiated, the largest from the ``outputs`` given, and ``state.loss``
        becomes a value that the trainer can differentiate to no effect. Keywords: ``loss``, ``outputs`` and perhaps
        ``model`` (as wrapped), ``backward`` (accelerate's), ``num_items_in_batch`` (targets of the whole optimizer
        step), ``micro_batches`` (their number in it) and ``step_batches`` (all of them).
        """
        if self._external is None:
            return
        if event.type_ == EventType.BATCH_START:
            self._external.begin(kwargs["batch_data"], active_session().lifecycle.global_step)
        if event.type_ == EventType.LOSS_CALCULATED:
            state.loss = self._external.step(**kwargs)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Write what an external trainer trained; leave nothing behind where the recipe ended early."""
        if self._external is not None:
            selection, self._external = selection_for(state), None
            self._save_elastic(selection.require_elastic(state.model), selection.peft_model, trained=True)
        _give_back(state.model)
        return True

    def _begin_external(self, selection: Selection, elastic: ElasticModel) -> None:
        if extraction_follows(self):
            raise RecipeError(
                "a recipe that an external trainer trains ends with OneForAllDistillationModifier: a subnet can be cut "
                "only after the training; give elastic_dir and use `amoeba extract` on it"
            )
        torch.manual_seed(self.seed)
        selection.peft_model = self.attach(elastic)
        trained = elastic.model if selection.peft_model is None else selection.peft_model
        self._external = ExternalSteps(SubnetStep(trained, elastic, self.options(), self.seed, StepHost()), trained)

    def _save_elastic(self, elastic: ElasticModel, peft_model: PeftModel | None, trained: bool) -> None:
        if self.elastic_dir is None:
            return
        trained_base = trained and self.adapter == "none"
        save_elastic(elastic, peft_model, Path(self.elastic_dir), str(elastic.config.name_or_path), trained_base)

    def _train(self, elastic: ElasticModel, calibration: list[Batch]) -> PeftModel | None:
        torch.manual_seed(self.seed)
        peft_model = self.attach(elastic)
        trained = elastic.model if peft_model is None else peft_model
        strategy, config = elastic.strategy, elastic.config
        of = {"model": strategy.fingerprint, "space": str(strategy.space), "kept_layers": strategy.depth.table}
        with self.training_directory(of, NOT_OF_THE_TRAINING) as directory, on_main_device(elastic.model):
            rows = self.rows(str(config.name_or_path), config.vocab_size, calibration)
            rows, apart = self._parted(rows)
            self.tell_repetition(len(rows))
            with torch.enable_grad():
                train_one_for_all(elastic, trained, rows, self.options(), self.arguments(directory))
            if apart:
                assert peft_model is not None
                fit_strengths(elastic, peft_model, apart)
        return None if peft_model is None else peft_model.eval()

    def _parted(self, rows: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], list[Batch]]:
        """Return what is trained on, and what decides about strengths."""
        smol = self.adapter != "none" and self.adapter.type == "smol"
        apart = min(self.strength_rows, len(rows) // 8)
        kept = len(rows) - (apart if smol and apart >= min(FEWEST, self.strength_rows) else 0)
        return rows[:kept], [{name: tensor[None] for name, tensor in row.items()} for row in rows[kept:]]

    def attach(self, elastic: ElasticModel) -> PeftModel | None:
        """Put the adapter on the elastic model; without one, its own parameters become trainable.

        Raises:
            ArchitectureError: If there is no adapter, and biases stand in for missing channels.
        """
        if self.adapter == "none":
            elastic.reordered_strategy()  # refuses before hours of training, not after them
            elastic.model.requires_grad_(True)
            return None
        settings = self.adapter.model_dump(exclude={"type"})
        settings["target_modules"] = self.adapter.target_modules or linear_names(elastic.layers)
        if self.adapter.type == "lora":
            settings = {name: value for name, value in settings.items() if name in LORA_FIELDS}
            return attach_lora(elastic, LoraConfig(**settings, task_type="CAUSAL_LM"))
        config = SmolConfig(**settings, adapt_largest=self.train_largest, task_type="CAUSAL_LM")
        return attach_smol(elastic, config)

    def options(self) -> OneForAllOptions:
        """Return what this recipe asks of the step."""
        values = {each.name: getattr(self, each.name) for each in fields(OneForAllOptions)}
        if isinstance(self.sampled_shapes, list):
            values["sampled_shapes"] = tuple(self.sampled_shapes)
        return OneForAllOptions(**values)


def _give_back(model: PreTrainedModel) -> None:
    """Make the whole model an ordinary one again, where no subnet was extracted: its adapter is in the elastic
    checkpoint."""
    selection = forget_selection(model)
    if selection is None or selection.elastic is None:
        return
    selection.elastic.release()
    if selection.peft_model is not None:
        selection.peft_model.unload()
