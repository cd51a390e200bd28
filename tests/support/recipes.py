"""Recipes of a few steps, and what runs, checks or refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, Trainer

import amoeba_plugin  # noqa: F401  # registers the modifiers
from amoeba_plugin.errors import AmoebaError
from amoeba_plugin.modifiers import TrainingEventsMixin
from amoeba_plugin.recipes.read import plan_recipe
from support.batches import tensor_rows
from support.models import SIZES

DEPTH = {"DepthShrinkingModifier": {"min_depth": 2, "keep_last": 1}}
WIDTH = {"WidthShrinkingModifier": {"widths": ["1", "3/4", "1/2"], "allocation": "uniform"}}
TRAIN = {
    "OneForAllDistillationModifier": {
        "adapter": {"r": 4, "num_experts": 3},
        "max_steps": 3,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
    }
}
EXTRACT = {"SubnetExtractionModifier": {"shape": "3x1/2"}}
GROUPS_OF_32 = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    }
}
QUANTIZATION = {
    "gptq": {"GPTQModifier": {"config_groups": GROUPS_OF_32, "ignore": ["lm_head"]}},
    "w8a8": {"QuantizationModifier": {"targets": ["Linear"], "scheme": "W8A8", "ignore": ["lm_head"]}},
    "w4a16": {"QuantizationModifier": {"config_groups": GROUPS_OF_32, "ignore": ["lm_head"]}},
    "awq": {
        "AWQModifier": {"n_grid": 4},
        "QuantizationModifier": {"config_groups": GROUPS_OF_32, "ignore": ["lm_head"]},
    },
}
TRAIN_FIELDS = {
    "adapter": {"r": 2, "num_experts": 3}, "max_steps": 3, "batch_size": 2, "gradient_accumulation_steps": 2,
    "learning_rate": 0.01, "num_random": 1, "strength_rows": 0,
}  # fmt: skip
GIVEN_DEPTHS = {"4": [0, 1, 2, 3], "3": [0, 2, 3], "2": [1, 3]}

GOOD = """
select_stage:
  a_modifiers:
    DepthShrinkingModifier: {min_depth: 2}
    WidthShrinkingModifier: {widths: ["1", "3/4"]}
finetune_stage:
  b_modifiers:
    OneForAllDistillationModifier: {adapter: {r: 4}, max_steps: 2}
extract_stage:
  c_modifiers:
    SubnetExtractionModifier: {shape: 3x3/4}
quantize_stage:
  d_modifiers:
    QuantizationModifier: {targets: [Linear], scheme: W8A8, ignore: [lm_head]}
"""


def recipe(*groups: dict[str, Any]) -> str:
    """Write one stage per group, as a YAML text."""
    stages = {f"s{i}_stage": {f"g{i}_modifiers": json.loads(json.dumps(group))} for i, group in enumerate(groups)}
    return yaml.safe_dump(stages, sort_keys=False)


def run(
    base: Path | PreTrainedModel, text: str, data: Any = None, output: Path | None = None, **options: Any
) -> PreTrainedModel:
    """Run a recipe by llm-compressor's ``oneshot``; return the model."""
    model: PreTrainedModel = oneshot(
        model=str(base) if isinstance(base, Path) else base,
        recipe=text,
        dataset=data,
        output_dir=None if output is None else str(output),
        **{"num_calibration_samples": 8, "max_seq_length": 16} | options,
    )
    return model


def training_recipe(elastic: Path, *more: dict[str, Any], **fields: Any) -> str:
    """Write a recipe that searches no depths and trains with some fields into a directory, then does more."""
    return recipe(
        {"DepthShrinkingModifier": {"min_depth": 2, "kept_layers": GIVEN_DEPTHS}},
        {"WidthShrinkingModifier": {"widths": ["1", "1/2"]}},
        {"OneForAllDistillationModifier": TRAIN_FIELDS | {"elastic_dir": str(elastic)} | fields},
        *more,
    )


def run_on_rows(base: Path | PreTrainedModel, text: str) -> PreTrainedModel:
    """Run a recipe on the rows of ``tensor_rows``, four to a batch."""
    return run(base, text, DataLoader(tensor_rows(), batch_size=4), max_seq_length=12)


class SessionTrainer(TrainingEventsMixin, Trainer):
    """A Trainer in a session of llm-compressor."""


def config_of(model_type: str = "llama", **overrides: Any) -> PretrainedConfig:
    """Return the configuration of 4 layers, 4 KV groups of 2 heads of 16 channels, and an MLP of 128."""
    return AutoConfig.for_model(model_type, **(SIZES | {"num_hidden_layers": 4} | overrides))


def refusal(text: str) -> str:
    """Return with what words a recipe is refused."""
    with pytest.raises(AmoebaError) as caught:
        plan_recipe(text)
    return str(caught.value)


def grouped(size: int) -> str:
    """Return the good recipe with weights quantized in groups of a size."""
    weights = f"{{num_bits: 4, strategy: group, group_size: {size}}}"
    groups = f"{{config_groups: {{g: {{targets: [Linear], weights: {weights}}}}}, ignore: [lm_head]}}"
    return GOOD.replace("{targets: [Linear], scheme: W8A8, ignore: [lm_head]}", groups)
