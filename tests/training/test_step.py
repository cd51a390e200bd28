"""One step in its details: packing, sampling from a list, when distillation ends, what is logged, what stops it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainingArguments

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import DataError, RecipeError, ShapeError, TrainingError
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.checkpoints import last_complete_checkpoint
from amoeba_plugin.training.one_for_all import step
from amoeba_plugin.training.one_for_all.micro_batch import MicroBatch, Share
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.sandwich import SandwichSampler
from amoeba_plugin.training.one_for_all.step import KeptLogits, StepHost, SubnetStep
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.models import random_elastic, tiny_llama

IGNORED = -100
PAPER = OneForAllOptions()


def make_step(elastic: ElasticModel, **options: Any) -> SubnetStep:
    return SubnetStep(elastic.model, elastic, OneForAllOptions(**options), 0, StepHost())


def run(step: SubnetStep, batch: dict[str, Tensor], place: tuple[int, int] = (0, 0)) -> dict[str, Tensor]:
    """Gradients of one micro-batch."""
    model = step.elastic.model
    model.zero_grad()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    step.run(MicroBatch(model, inputs, step.positions(batch), place, Share.even(1.0)))
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def make_batch(seed: int = 0, length: int = 10) -> dict[str, Tensor]:
    tokens = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[:, :4] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def train(directory: Path, elastic: ElasticModel, options: OneForAllOptions = PAPER, **fields: Any) -> None:
    defaults = {
        "output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 4,
        "save_strategy": "no", "per_device_train_batch_size": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    batch = make_batch()
    rows = [{"input_ids": i, "labels": label} for i, label in zip(batch["input_ids"], batch["labels"], strict=True)] * 8
    train_one_for_all(elastic, elastic.model, rows, options, TrainingArguments(**defaults | fields))


# Packing and padding


@settings(max_examples=10)
@given(st.lists(st.integers(2, 7), min_size=2, max_size=4), st.sampled_from([0.4, 1.0]), st.booleans(), st.booleans())
def test_packed_rows_learn_what_padded_rows_learn(
    lengths: list[int], kd_weight: float, all_tokens: bool, one_row: bool
) -> None:
    """In one row, or in two of different lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length in lengths:
        tokens = torch.randint(61, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.7, tokens, IGNORED)
        labels[0], labels[-1] = IGNORED, tokens[-1]  # nothing predicts a document's first token
        rows.append({"input_ids": tokens, "labels": labels})
    documents = [row | {"position_ids": torch.arange(len(row["labels"]))} for row in rows]
    parts = [documents] if one_row else [documents[:-1], documents[-1:]]
    packed = [{name: torch.cat([row[name] for row in part]) for name in part[0]} for part in parts]
    elastic = random_elastic(tiny_llama())
    step = make_step(elastic, kd_weight=kd_weight, num_random=0, distill_all_tokens=all_tokens)
    collate = PaddingCollator()
    torch.testing.assert_close(run(step, collate(packed)), run(step, collate(rows)), rtol=1e-3, atol=1e-5)


# Sampling


@given(st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True), st.integers(0, 4), st.integers(0, 50))
def test_random_shapes_come_from_the_list_and_the_ends_always(chosen: list[int], num_random: int, step: int) -> None:
    space = ShapeSpace((12, 11, 10, 8), tuple(SubnetShape.parse(f"1x{text}").width for text in ("1", "7/8", "3/4")))
    listed = tuple(list(space)[index] for index in chosen)
    shapes = SandwichSampler(space, num_random, 7, listed).shapes(step)
    assert (shapes[0], shapes[-1], len(shapes)) == (space.largest, space.smallest, num_random + 2)
    assert set(shapes[1:-1]) <= set(listed)
    if len(listed) >= num_random:
        assert len(set(shapes[1:-1])) == num_random


def test_a_listed_shape_outside_the_space_is_refused() -> None:
    with pytest.raises(ShapeError, match="5x1"):
        make_step(random_elastic(tiny_llama()), sampled_shapes=("3x1/2", "5x1"))


def test_all_draws_every_shape_but_the_ends_which_are_there_anyway() -> None:
    elastic = random_elastic(tiny_llama())
    sampler = make_step(elastic).sampler
    drawn = {shape for step in range(200) for shape in sampler.shapes(step)[1:-1]}
    assert drawn == set(elastic.space) - {elastic.space.largest, elastic.space.smallest}


def test_the_reference_draws_no_narrow_subnet_of_all_layers() -> None:
    elastic = random_elastic(tiny_llama())
    sampler = make_step(elastic, sampled_shapes="independent").sampler
    drawn = {shape for step in range(200) for shape in sampler.shapes(step)[1:]}
    assert max(shape.depth for shape in drawn) < elastic.space.largest.depth


def test_sampled_shapes_that_are_neither_a_list_nor_all_are_refused() -> None:
    with pytest.raises(RecipeError, match="sampled_shapes 'every'"):
        OneForAllOptions(sampled_shapes="every")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="sampled_shapes is empty"):
        OneForAllOptions(sampled_shapes=())


# Objective


def test_after_distill_steps_all_learn_from_the_labels() -> None:
    elastic, batch = random_elastic(tiny_llama()), make_batch()
    step = make_step(elastic, distill_steps=3, loss_balancing=False, num_random=0)
    assert not torch.allclose(*(run(step, batch, (at, 0))["lm_head.weight"] for at in (2, 3)))
    found = run(step, batch, (3, 0))
    elastic.model.zero_grad()
    for shape in (elastic.space.largest, elastic.space.smallest):
        with elastic.active(shape) as model:
            model(**batch).loss.backward()
    expected = {name: value.grad for name, value in elastic.model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_without_a_target_are_distilled_with_balancing_too() -> None:
    """The largest subnet has no loss then, to which the others' could be scaled."""
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    found = [
        run(make_step(random_elastic(tiny_llama()), distill_all_tokens=True, loss_balancing=balanced), batch)
        for balanced in (True, False)
    ]
    assert any(gradient.any() for gradient in found[0].values())
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_no_teacher_is_kept_where_nothing_is_distilled() -> None:
    elastic, batch = random_elastic(tiny_llama()), make_batch()
    with mock.patch.object(KeptLogits, "write", side_effect=AssertionError):
        assert run(make_step(elastic, distill_steps=3), batch, (3, 0))
        assert run(make_step(elastic, kd_weight=0.0, distill_all_tokens=True), batch)
        with pytest.raises(AssertionError):
            run(make_step(elastic, distill_steps=3), batch, (2, 0))


def test_gradient_conflict_is_the_cosine_of_gradients_taken_one_by_one() -> None:
    elastic, batch = random_elastic(tiny_llama()), make_batch()
    step = make_step(elastic, conflict_every=2, loss_balancing=False, num_random=0, distill_steps=0)
    run(step, batch, (1, 0))
    assert not [name for name in step.means.flush()[1] if name.startswith("conflict")]
    run(step, batch, (2, 0))
    (name,) = (cosines := {k: v for k, v in step.means.flush()[1].items() if k.startswith("conflict")})
    assert name == "conflict/4x1~2x1/2"
    flat = []
    for shape in (elastic.space.largest, elastic.space.smallest):
        elastic.model.zero_grad()
        with elastic.active(shape) as model:
            model(**batch).loss.backward()
        flat.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in everything(elastic)])
        )
    assert cosines[name] == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-5)


def test_conflict_of_a_shape_drawn_twice_is_the_mean_and_it_has_none_with_itself() -> None:
    elastic, batch = random_elastic(tiny_llama()), make_batch()
    step = make_step(elastic, conflict_every=1, loss_balancing=False, distill_steps=0)
    drawn = [SubnetShape.parse(text) for text in ("4x1", "2x1/2", "3x1/2", "2x1/2")]
    step.sampler = mock.Mock(shapes=lambda *place: drawn)
    scales = iter((1, 1, 1, -3))  # the two draws of 2x1/2 pull in opposite directions
    step.host.backward = lambda loss: (loss * next(scales)).backward()
    run(step, batch)
    found = {name for name in step.means.flush()[1] if name.startswith("conflict")}
    assert found == {"conflict/4x1~3x1/2", "conflict/4x1~2x1/2", "conflict/3x1/2~2x1/2"}
    scales = iter((1, 1, 1, -3))
    run(step, batch)
    means = step.means.flush()[1]
    assert means["conflict/4x1~2x1/2"] == pytest.approx(0, abs=1e-6)
    assert means["conflict/3x1/2~2x1/2"] == pytest.approx(0, abs=1e-6)
    assert abs(means["conflict/4x1~3x1/2"]) > 1e-3


def everything(elastic: ElasticModel) -> list[torch.nn.Parameter]:
    with elastic.active(elastic.space.largest) as model:
        return list(model.parameters())


def test_the_entropy_of_the_router_is_logged(tmp_path: Path) -> None:
    elastic = random_elastic(tiny_llama())
    model = attach_smol(elastic, SmolConfig(r=2, num_experts=3, top_k=3, target_modules=["q_proj"]))
    batch = make_batch()
    rows = [{"input_ids": i, "labels": label} for i, label in zip(batch["input_ids"], batch["labels"], strict=True)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no",
        logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = OneForAllTrainer(
        model, elastic, OneForAllOptions(), args=arguments, train_dataset=rows, data_collator=PaddingCollator()
    )
    assert trainer.args is not arguments
    assert arguments.ddp_find_unused_parameters is None
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    weights = [log[f"router/2x1/2/expert_{index}"] for index in range(3)]
    expected = -sum(weight * math.log(weight) for weight in weights)
    assert log["router/2x1/2/entropy"] == pytest.approx(expected, abs=1e-5)


def test_one_for_all_training_draws_the_routers_noise_from_its_own_seed() -> None:
    found = []
    for router_seed, seed in ((0, 0), (1, 0), (1, 1)):
        torch.manual_seed(0)
        elastic = random_elastic(tiny_llama())
        model = attach_smol(elastic, SmolConfig(r=2, target_modules=["q_proj"], router_seed=router_seed))
        SubnetStep(model.train(), elastic, PAPER, seed, StepHost()).begin((3, 1))
        found.append(model.base_model.router.weights("default").state.noise)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


# What stops a training


def test_a_ratio_that_explodes_stops(tmp_path: Path) -> None:
    elastic = random_elastic(tiny_llama())
    options = OneForAllOptions(max_balance_ratio=math.inf)
    nothing = mock.patch.object(step, "distilled_rows", return_value=lambda logits, place: logits.sum(-1) * 0)
    with nothing, pytest.raises(TrainingError, match="balancing ratio of subnet .* is inf"):
        train(tmp_path, elastic, options)


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path) -> None:
    elastic = random_elastic(tiny_llama())
    elastic.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: value.detach().clone() for name, value in elastic.model.named_parameters()}
    with pytest.raises(TrainingError, match="gradient at step 0 is not finite"):
        train(tmp_path, elastic)
    assert all(torch.equal(value, before[name]) for name, value in elastic.model.named_parameters())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_disk_that_fills_leaves_the_checkpoint_before(tmp_path: Path, error: Exception) -> None:
    original = OneForAllTrainer._save_optimizer_and_scheduler

    def full(self: OneForAllTrainer, directory: str) -> None:
        if directory.endswith("-2"):
            raise error
        original(self, directory)

    with (
        mock.patch.object(OneForAllTrainer, "_save_optimizer_and_scheduler", full),
        pytest.raises(TrainingError, match="checkpoint-2 cannot be written .*go on from .*checkpoint-1"),
    ):
        train(tmp_path, random_elastic(tiny_llama()), save_strategy="steps", save_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_error_that_is_no_full_disk_is_left_as_it_is(tmp_path: Path) -> None:
    """A process that does not answer, for example; what was saved so far stays, to be passed over."""
    original = OneForAllTrainer._save_optimizer_and_scheduler

    def lost(self: OneForAllTrainer, directory: str) -> None:
        if directory.endswith("-2"):
            raise torch.distributed.DistBackendError("rank 1 is gone")
        original(self, directory)

    with (
        mock.patch.object(OneForAllTrainer, "_save_optimizer_and_scheduler", lost),
        pytest.raises(torch.distributed.DistBackendError, match="rank 1 is gone"),
    ):
        train(tmp_path, random_elastic(tiny_llama()), save_strategy="steps", save_steps=1)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_checkpoint_that_is_whole_is_kept_when_an_older_one_cannot_be_removed(tmp_path: Path) -> None:
    with (
        mock.patch.object(transformers.trainer, "rotate_checkpoints", side_effect=PermissionError(13, "denied")),
        pytest.raises(PermissionError),
    ):
        train(tmp_path, random_elastic(tiny_llama()), save_strategy="steps", save_steps=1)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_labels_that_do_not_align_are_refused() -> None:
    step = make_step(random_elastic(tiny_llama()))
    batch = make_batch()
    with pytest.raises(DataError, match=r"input_ids \(2, 10\) and labels \(2, 9\)"):
        step.positions(batch | {"labels": batch["labels"][:, 1:]})


@pytest.mark.parametrize(
    ("fields", "message"), [({"distill_steps": -1}, "distill_steps -1"), ({"conflict_every": -1}, "conflict_every -1")]
)
def test_options_out_of_range_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        OneForAllOptions(**fields)
