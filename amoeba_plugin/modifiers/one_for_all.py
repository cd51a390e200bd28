"""OneForAllDistillationModifier: SMOL, sandwich sampling and balanced in-place distillation, as a recipe step."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments

from amoeba_plugin.architecture import linear_names
from amoeba_plugin.calibration import Batch, load_batches
from amoeba_plugin.checkpoint import attach_smol, require_replaceable, save_elastic
from amoeba_plugin.elastic import ElasticModel
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.modifiers.order import extraction_follows, require_session_order
from amoeba_plugin.modifiers.selection import forget_selection, on_main_device, selection_for
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training import OneForAllOptions, train_one_for_all

ROW_COLUMNS = ("input_ids", "attention_mask", "labels")


class AdapterOptions(BaseModel):
    """SMOL's settings; see :class:`amoeba_plugin.smol.SmolConfig` for the formulas.

    Attributes:
        r: Rank of each expert. Default 64 (paper).
        lora_alpha: Scale is ``lora_alpha / r``. Default 16 (paper).
        num_experts: LoRAs per linear. Default 5 (reference code).
        top_k: Experts mixed at each shape. Default 2 (reference code).
        lora_dropout: Dropout before the adapter. Default 0.
        combination: ``factors`` (reference code) or ``outputs`` (the paper's figure). Default ``factors``.
        target_modules: Names of the linears that get an adapter. Default: all linears of every decoder layer.
        router_noise: Noise on the router's logits in training. Default true (reference code).
        router_temperature: Divides the router's logits before the softmax: below 1, shapes are told apart sooner.
            Default 1.
        router_load_balancing: Weight of the loss that makes the shapes use all experts. Default 0, off (reference
            code).
    """

    model_config = ConfigDict(extra="forbid")

    r: int = Field(default=64, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    num_experts: int = Field(default=5, ge=1)
    top_k: int = Field(default=2, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    combination: Literal["factors", "outputs"] = "factors"
    target_modules: list[str] | None = None
    router_noise: bool = True
    router_temperature: float = Field(default=1.0, gt=0)
    router_load_balancing: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _top_k_exists(self) -> AdapterOptions:
        if self.top_k > self.num_experts:
            raise RecipeError(
                f"adapter.top_k {self.top_k} of num_experts {self.num_experts}: choose at most all of them"
            )
        return self


class OneForAllDistillationModifier(Modifier):
    """Train one SMOL adapter that serves every shape of the space (AmoebaLLM, arXiv:2411.10606, sections 4.2 and 4.3).

    Sample YAML::

        finetune_stage:
          amoeba_finetune_modifiers:
            OneForAllDistillationModifier:
              adapter: {r: 64, lora_alpha: 16, num_experts: 5, top_k: 2}
              max_steps: 10000
              elastic_dir: OUT/elastic

    Attributes:
        adapter: SMOL's settings, see :class:`AdapterOptions`.
        dataset: Training text: a local file or a hub id. Default: the calibration data.
        dataset_split: Split of ``dataset``. Default ``train``.
        num_samples: Sequences taken from ``dataset``. Default 10,000.
        max_seq_length: Tokens per sequence of ``dataset``. Default 512.
        max_steps: Optimizer steps; 0 trains nothing and keeps the selection alone. Default 10,000 (paper).
        batch_size: Sequences per micro-batch. Default 2 (reference code).
        gradient_accumulation_steps: Micro-batches per step, each with subnets of its own. Default 4 (reference code).
        learning_rate: AdamW's. Default 2e-4 (paper).
        lr_scheduler_type: A schedule of transformers. Default ``constant`` (paper).
        warmup_steps: Steps of linear warm-up. Default 0.
        max_grad_norm: Gradient norm clipped to. Default 0.3 (reference code).
        train_largest: Also train the whole model, which teaches the others, on the labels. False leaves it the base
            model, bit for bit, and saves its backward pass: for text that the base already knows. Default true (paper).
        num_random: Random subnets between largest and smallest in each micro-batch. Default 2 (reference code).
        loss: ``soft_cross_entropy`` (reference code), or another of :mod:`amoeba_plugin.distillation`.
        temperature: Softens teacher and student. Default 1.
        kd_weight: Weight of distillation against the labels for all but the largest subnet. Default 1.
        loss_balancing: Scale each subnet's gradient by loss of the largest / its loss. Default true.
        gradient_checkpointing: Recompute activations in the backward pass. Default false.
        seed: Of sampling, initialisation and data order. Default 42.
        elastic_dir: Where to write the elastic checkpoint. Default: none is written.
    """

    adapter: AdapterOptions = AdapterOptions()
    dataset: str | None = None
    dataset_split: str = "train"
    num_samples: int = Field(default=10_000, ge=1)
    max_seq_length: int = Field(default=512, ge=2)
    max_steps: int = Field(default=10_000, ge=0)
    batch_size: int = Field(default=2, ge=1)
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler_type: str = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=0.3, ge=0)
    train_largest: bool = True
    num_random: int = Field(default=2, ge=0)
    loss: str = "soft_cross_entropy"
    temperature: float = Field(default=1.0, gt=0)
    kd_weight: float = Field(default=1.0, ge=0, le=1)
    loss_balancing: bool = True
    gradient_checkpointing: bool = False
    seed: int = 42
    elastic_dir: str | None = None

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Freeze the base, add SMOL, train, write the elastic checkpoint."""
        require_session_order(self)
        if self.elastic_dir is not None:
            require_replaceable(Path(self.elastic_dir))
        selection = selection_for(state)
        elastic = selection.require_elastic(state.model)
        if self.max_steps:
            with selection.timed("one-for-all training"):
                selection.peft_model = self._train(elastic, selection.batches)
        if self.elastic_dir is not None:
            save_elastic(elastic, selection.peft_model, Path(self.elastic_dir), str(elastic.config.name_or_path))
        if not extraction_follows(self):  # before the host's pipelines wrap the modules' forward methods
            _give_back(state.model)
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Leave nothing behind where the recipe ended early."""
        _give_back(state.model)
        return True

    def _train(self, elastic: ElasticModel, calibration: list[Batch]) -> PeftModel:
        torch.manual_seed(self.seed)
        config = SmolConfig(
            **self.adapter.model_dump(exclude={"target_modules"}),
            target_modules=self.adapter.target_modules or linear_names(elastic.layers),
            adapt_largest=self.train_largest,
            router_seed=self.seed,
            task_type="CAUSAL_LM",
        )
        peft_model = attach_smol(elastic, config)
        options = OneForAllOptions(
            loss=self.loss,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            loss_balancing=self.loss_balancing,
            num_random=self.num_random,
            train_largest=self.train_largest,
        )
        with (
            tempfile.TemporaryDirectory() as scratch,
            on_main_device(elastic.model),
            torch.enable_grad(),
        ):
            train_one_for_all(elastic, peft_model, self._rows(elastic, calibration), options, self._arguments(scratch))
        return peft_model.eval()

    def _rows(self, elastic: ElasticModel, calibration: list[Batch]) -> list[dict[str, Tensor]]:
        batches = calibration
        if self.dataset is not None:
            batches = load_batches(
                self.dataset,
                AutoTokenizer.from_pretrained(elastic.config.name_or_path),
                split=self.dataset_split,
                num_samples=self.num_samples,
                max_seq_length=self.max_seq_length,
                batch_size=1,
                seed=self.seed,
            )
        return [
            {name: batch[name][row] for name in ROW_COLUMNS}
            for batch in batches
            for row in range(len(batch["input_ids"]))
        ]

    def _arguments(self, scratch: str) -> TrainingArguments:
        return TrainingArguments(
            output_dir=scratch,
            max_steps=self.max_steps,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            max_grad_norm=self.max_grad_norm,
            gradient_checkpointing=self.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if self.gradient_checkpointing else None,
            seed=self.seed,
            data_seed=self.seed,
            logging_steps=max(1, self.max_steps // 20),
            save_strategy="no",
            disable_tqdm=False,  # else a quiet log level prints every logged number instead
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )


def _give_back(model: PreTrainedModel) -> None:
    """Make the whole model an ordinary one again, where no subnet was extracted: its adapter is in the elastic
    checkpoint."""
    selection = forget_selection(model)
    if selection is None or selection.elastic is None:
        return
    selection.elastic.release()
    if selection.peft_model is not None:
        selection.peft_model.unload()
