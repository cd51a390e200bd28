"""What an evaluation measures: the active shape and others, by names that every consumer of metrics can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, EvalPrediction
from transformers.trainer_callback import ProgressCallback

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ShapeError, TrainingError
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.batches import make_rows
from support.training import PAPER, add_smol, make_arguments, make_elastic

Rows = list[dict[str, list[int]]]


def trainer_of(elastic: ElasticModel, directory: Path, rows: Any, **fields: Any) -> OneForAllTrainer:
    """Return a trainer that evaluates on some rows, one at a time."""
    keywords = {name: fields.pop(name) for name in ("eval_shapes", "compute_metrics", "callbacks") if name in fields}
    arguments = make_arguments(directory, per_device_eval_batch_size=2, **fields)
    return OneForAllTrainer(
        elastic.model, elastic, PAPER, args=arguments, train_dataset=make_rows(), eval_dataset=rows, **keywords
    )


def loss_at(elastic: ElasticModel, shape: object, rows: Rows) -> float:
    """Return the mean loss of batches of two at a shape, as one computes it without a Trainer."""
    losses = []
    with elastic.active(str(shape)), torch.no_grad():
        for start in range(0, len(rows), 2):
            losses.append(elastic.model.eval()(**PaddingCollator()(rows[start : start + 2])).loss.item())
    return float(np.mean(losses))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("asked", "measured"),
    [(None, ("4x1", "3x3/4", "2x1/2")), (("3x1", "2x0.75"), ("3x1", "2x3/4", "3x3/4")), ("all", None)],
)
def test_every_shape_has_the_loss_of_a_loop_over_its_batches(
    tmp_path: Path, asked: Any, measured: tuple[str, ...] | None, adapter: bool
):
    elastic, rows = make_elastic(), make_rows(4) + make_rows(2, targets=9)
    if adapter:
        add_smol(elastic)
    trainer = trainer_of(elastic, tmp_path, rows, eval_shapes=asked)
    elastic.set_shape("3x3/4")
    found = trainer.evaluate()
    assert str(elastic.shape) == "3x3/4"
    shapes = {str(shape) for shape in elastic.space} if measured is None else set(measured)
    assert {name for name in found if "loss" in name} == {"eval_loss"} | {f"eval_loss_{shape}" for shape in shapes}
    for shape in shapes:
        assert found[f"eval_loss_{shape}"] == pytest.approx(loss_at(elastic, shape, rows), abs=1e-5)
    assert found["eval_loss"] == found["eval_loss_3x3/4"]
    assert len({found[f"eval_loss_{shape}"] for shape in shapes}) == len(shapes)


def test_metrics_of_ones_own_and_several_data_sets_are_of_every_shape(tmp_path: Path):
    def mean_logit(prediction: EvalPrediction) -> dict[str, float]:
        return {"mean_logit": float(np.abs(prediction.predictions).mean())}

    elastic = make_elastic()
    sets = {"first": make_rows(2), "second": make_rows(4, seed=1)}
    trainer = trainer_of(elastic, tmp_path, sets, compute_metrics=mean_logit)
    found = trainer.evaluate()
    for name, rows in sets.items():
        for shape in ("4x1", "2x1/2"):
            assert found[f"eval_{name}_loss_{shape}"] == pytest.approx(loss_at(elastic, shape, rows), abs=1e-5)
            with elastic.active(shape), torch.no_grad():
                expected = elastic.model(**PaddingCollator()(rows)).logits.abs().mean().item()
            assert found[f"eval_{name}_mean_logit_{shape}"] == pytest.approx(expected, abs=1e-5)
    elastic.set_shape("2x1/2")
    assert trainer.predict(sets["first"]).metrics["test_mean_logit"] == found["eval_first_mean_logit_2x1/2"]


def test_an_evaluation_is_one_event_with_all_metrics_and_can_be_written(tmp_path: Path):
    trainer = trainer_of(make_elastic(), tmp_path, make_rows(4), eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert all({"eval_loss_4x1", "eval_loss_2x1/2"} <= set(entry) for entry in logged)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    written = json.loads((tmp_path / "eval_results.json").read_text())
    assert written["eval_loss_2x1/2"] == metrics["eval_loss_2x1/2"]
    names = {path.name for path in tmp_path.rglob("*")}
    assert not [name for name in names if "2x1" in name]


@pytest.mark.parametrize("metric", ["loss", "eval_loss_4x1", "loss_2x1/2", "loss_3x3/4"])
def test_the_best_checkpoint_is_the_best_of_any_shape(tmp_path: Path, metric: str):
    """It is the last or the first for some: the rate is so large that shapes get worse."""
    elastic = make_elastic()
    trainer = trainer_of(
        elastic, tmp_path, make_rows(4, seed=3), max_steps=4, learning_rate=0.3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model=metric,
        eval_shapes=("3x3/4", "2x1/2", "4x1"),
    )  # fmt: skip
    trainer.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    losses = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert max(losses) > min(losses) + 0.1
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()[name] == pytest.approx(min(losses), abs=1e-6)


def test_a_shape_can_stop_the_training_early(tmp_path: Path):
    trainer = trainer_of(
        make_elastic(), tmp_path, make_rows(4, seed=3), max_steps=30, learning_rate=0.5, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss_2x1/2", callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    assert trainer.train().global_step < 30


def test_what_is_not_measured_is_refused_before_the_training(tmp_path: Path):
    elastic = make_elastic()
    with pytest.raises(TrainingError, match="eval_loss_4x1, eval_loss_2x1/2; take one of these, or name the shape in"):
        trainer_of(elastic, tmp_path, make_rows(2), metric_for_best_model="eval_loss_3x1")
    with pytest.raises(ShapeError, match="shape 7x1 is outside the space"):
        trainer_of(elastic, tmp_path, make_rows(2), eval_shapes=["7x1"])
    with pytest.raises(ShapeError, match="eval_shapes 'some': give a list of shapes, or all"):
        trainer_of(elastic, tmp_path, make_rows(2), eval_shapes="some")
    metrics = ("top_5", "accuracy", "loss_per_byte", "iou_2x9")
    fields = [trainer_of(elastic, tmp_path, [], metric_for_best_model=name).args.greater_is_better for name in metrics]
    assert all(fields)


def test_the_bar_of_an_evaluation_begins_again_for_every_shape(tmp_path: Path):
    positions: list[int] = []

    class Watched(ProgressCallback):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            super().on_prediction_step(*args, **kwargs)
            positions.append(self.prediction_bar.n)

    trainer = trainer_of(make_elastic(), tmp_path, make_rows(4), callbacks=[Watched()])
    trainer.evaluate()
    assert positions == [1, 2, 1, 2]
