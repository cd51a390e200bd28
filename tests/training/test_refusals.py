"""Trainings that cannot work are refused in words."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from peft import LoraConfig, get_peft_model

from amoeba_plugin.elastic.lora import follow_lora
from amoeba_plugin.errors import DataError, RecipeError, TrainingError
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.checks import require_supported
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.batches import make_rows
from support.training import PAPER, add_smol, make_arguments, make_elastic, make_trainer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "mse"}, "loss 'mse' is unknown; choose one of soft_cross_entropy, kl"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"kd_weight": 1.5}, "kd_weight 1.5"),
        ({"max_balance_ratio": 0.0}, "max_balance_ratio 0.0"),
        ({"num_random": -1}, "num_random -1"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"kd_weight": math.nan}, "kd_weight nan"),
        ({"max_balance_ratio": math.nan}, "max_balance_ratio nan"),
        ({"sampled_shapes": ("3x1/2", "wide")}, "sampled_shapes: 'wide' is not a subnet shape"),
        ({"sampled_shapes": ("3x5/4",)}, "sampled_shapes: .*width 5/4"),
    ],
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        OneForAllOptions(**fields)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data set is empty"),
        (make_rows(3, targets=0), "none of the 3 training rows has a target"),
        ([{"input_ids": [1, 2, 3]}], "but no labels"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "3 input_ids and 2 labels"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}], "2 input_ids and 1 attention_mask"),
        ([{"text": "no tokens"}], "a row has no input_ids, only columns that no model takes; tokenise"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}], "give all rows the same columns"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "label": 3}], "2 input_ids and no list of label; give one of each"),
        (
            [{name: [0, 1, 0, 1] for name in ("input_ids", "labels", "attention_mask", "position_ids")}],
            "a row has packed documents .* and an attention_mask",
        ),
        ([{"input_ids": [], "labels": []}, {"input_ids": [1, 2], "labels": [1, 2]}], "leave empty rows out"),
    ],
)
def test_useless_data_is_refused(tmp_path: Path, rows: list[dict[str, list[int]]], message: str):
    elastic = make_elastic()
    with pytest.raises(DataError, match=message):
        train_one_for_all(elastic, elastic.model, rows, PAPER, make_arguments(tmp_path))


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path):
    elastic = make_elastic()
    elastic.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter requires a gradient"):
        train_one_for_all(elastic, elastic.model, make_rows(), PAPER, make_arguments(tmp_path))


def test_an_adapter_that_does_not_follow_the_shape_is_refused(tmp_path: Path):
    elastic = make_elastic()
    widths, depths = [str(width) for width in elastic.space.widths], list(elastic.space.depths)
    model = get_peft_model(elastic.model, SmolConfig(widths=widths, depths=depths, target_modules="all-linear"))
    with pytest.raises(TrainingError, match="does not follow the elastic model's shape"):
        make_trainer(elastic, tmp_path, model=model)


def test_a_lora_that_does_not_follow_the_shape_is_refused(tmp_path: Path):
    elastic = make_elastic()
    model = get_peft_model(elastic.model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TrainingError, match="put it on with attach_lora"):
        make_trainer(elastic, tmp_path, model=model)
    follow_lora(elastic, model)
    make_trainer(elastic, tmp_path, model=model).train()


def test_another_model_than_the_elastic_one_is_refused(tmp_path: Path):
    with pytest.raises(TrainingError, match="neither the elastic model's own nor a PeftModel around it"):
        make_trainer(make_elastic(), tmp_path, model=make_elastic().model)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_teacher_that_others_would_change_is_refused(tmp_path: Path, adapter: bool):
    elastic = make_elastic()
    options = dataclasses.replace(PAPER, train_largest=False)
    with pytest.raises(TrainingError, match=r"wants SMOL with SmolConfig\(adapt_largest=False\)"):
        make_trainer(elastic, tmp_path, options, model=add_smol(elastic) if adapter else None)


def test_a_loss_of_ones_own_is_refused(tmp_path: Path):
    elastic = make_elastic()
    with pytest.raises(TrainingError, match="compute_loss_func is not supported"):
        OneForAllTrainer(elastic.model, elastic, PAPER, args=make_arguments(tmp_path), compute_loss_func=max)


def test_an_overridden_compute_loss_is_refused(tmp_path: Path):
    """It would change the evaluation alone, and nobody would know."""

    class Weighted(OneForAllTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    elastic = make_elastic()
    with pytest.raises(TrainingError, match="Weighted overrides compute_loss, .* override training_step"):
        Weighted(elastic.model, elastic, PAPER, args=make_arguments(tmp_path))


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_steps_in_every_backward_is_refused(tmp_path: Path, optim: str):
    with pytest.raises(TrainingError, match=f"optim='{optim}' changes parameters in every backward"):
        make_trainer(make_elastic(), tmp_path, optim=optim)


def test_parallelism_of_tensors_and_sequences_is_refused(tmp_path: Path):
    trainer = make_trainer(make_elastic(), tmp_path)
    with (
        mock.patch.object(Accelerator, "parallelism_config", ParallelismConfig(cp_size=2)),
        pytest.raises(TrainingError, match="context and sequence parallelism are not supported"),
    ):
        require_supported(trainer, PAPER)


def test_label_smoothing_is_refused(tmp_path: Path):
    with pytest.raises(TrainingError, match="label_smoothing_factor is not supported"):
        make_trainer(make_elastic(), tmp_path, label_smoothing_factor=0.1)
