"""One-for-all training on tiny random models: against a plain re-implementation, and as a Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from support.batches import make_rows
from support.models import random_elastic, tiny_llama
from support.training import make_arguments
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.elastic.lora import follow_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import DataError, RecipeError, TrainingError
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.checks import require_supported
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.sandwich import SandwichSampler, step_seed
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer

Row = dict[str, list[int]]
VOCABULARY, LENGTH = 61, 12
PAPER = OneForAllOptions(sampled_shapes="independent")


def make_elastic(seed: int = 0, **config: Any) -> ElasticModel:
    """A four-layer Llama with 4 KV groups, elastic in depth and width."""
    return random_elastic(tiny_llama(seed, **config), seed)


def make_trainer(
    elastic: ElasticModel, directory: Path, options: OneForAllOptions = PAPER, model: nn.Module | None = None,
    rows: list[Row] | None = None, **fields: Any,
) -> OneForAllTrainer:  # fmt: skip
    """A trainer of the elastic model (all parameters), or of an adapter."""
    return OneForAllTrainer(
        model or elastic.model, elastic, options, args=make_arguments(directory, **fields),
        train_dataset=make_rows() if rows is None else rows, data_collator=PaddingCollator(),
    )  # fmt: skip


def add_smol(elastic: ElasticModel, seed: int = 0, **fields: Any) -> PeftModel:
    """A SMOL adapter that changes outputs from the start."""
    torch.manual_seed(seed)
    return attach_smol(
        elastic, SmolConfig(r=4, num_experts=3, init_weights=False, target_modules="all-linear", **fields)
    )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# Sampling


spaces = st.builds(
    ShapeSpace,
    st.lists(st.integers(1, 40), min_size=1, max_size=8).map(tuple),
    st.lists(st.fractions("1/8", 1, max_denominator=8), min_size=1, max_size=5).map(tuple),
)


@given(spaces, st.integers(0, 4), st.integers(0, 2**32), st.integers(0, 10**6), st.integers(0, 7))
def test_sandwich_always_has_largest_and_smallest(
    space: ShapeSpace, num_random: int, seed: int, step: int, micro_step: int
):
    shapes = SandwichSampler(space, num_random, seed).shapes(step, micro_step)
    assert shapes == SandwichSampler(space, num_random, seed).shapes(step, micro_step)
    if len(space) == 1:
        assert shapes == [space.largest]
        return
    assert (shapes[0], shapes[-1], len(shapes)) == (space.largest, space.smallest, num_random + 2)
    between = shapes[1:-1]
    assert all(shape in space for shape in between)
    if len(space.depths) > 1:
        assert all(shape.depth < space.largest.depth for shape in between)
    if len(space.widths) >= num_random:
        assert len({shape.width for shape in between}) == num_random


def test_sandwich_reaches_every_depth_below_the_largest_and_every_width():
    space = ShapeSpace(tuple(range(20, 33)), (Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(5, 8)))
    sampler = SandwichSampler(space, 2, 42)
    drawn = [shape for step in range(300) for shape in sampler.shapes(step)[1:-1]]
    assert {shape.depth for shape in drawn} == set(range(20, 32))
    assert {shape.width for shape in drawn} == set(space.widths)


def test_every_micro_step_draws_anew():
    sampler = SandwichSampler(ShapeSpace(tuple(range(1, 33)), (Fraction(1), Fraction(1, 2))), 2, 0)
    assert len({tuple(sampler.shapes(step, micro)) for step in range(5) for micro in range(4)}) == 20
    assert len({step_seed(0, step, micro) for step in range(5) for micro in range(4)}) == 20


# The step


def plain_step(
    elastic: ElasticModel,
    model: nn.Module,
    batch: dict[str, Tensor],
    shapes: list[SubnetShape],
    options: OneForAllOptions,
):
    """The objective as the paper says it: the subnets' losses added up, full-length logits and masks."""
    input_ids, labels = batch["input_ids"], batch["labels"]
    mask = labels[:, 1:] != -100
    teacher = loss_largest = None
    for shape in shapes:
        elastic.set_shape(shape)
        logits = model(input_ids=input_ids, attention_mask=batch.get("attention_mask")).logits[:, :-1].float()
        hard = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100)
        if teacher is None:
            teacher, loss_largest, total = logits.detach().softmax(-1), hard.detach(), hard
        else:
            soft = -(teacher * logits.log_softmax(-1)).sum(-1)
            loss = options.kd_weight * (soft * mask).sum() / mask.sum() + (1 - options.kd_weight) * hard
            total = loss * (loss_largest / loss.detach()) if options.loss_balancing else loss
        total.backward()
    elastic.set_shape(elastic.space.largest)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("adapter", ["none", "smol"])
@pytest.mark.parametrize(
    "options", [PAPER, OneForAllOptions(kd_weight=0.4, num_random=1), OneForAllOptions(loss_balancing=False)]
)
def test_step_gradients_equal_a_plain_implementation(tmp_path: Path, adapter: str, options: OneForAllOptions):
    elastic = make_elastic()
    model = add_smol(elastic, router_noise=False) if adapter == "smol" else elastic.model
    rows = make_rows(2) + make_rows(2, targets=3, length=8)  # padded, with different numbers of targets
    batch = PaddingCollator()(rows)
    trainer = make_trainer(elastic, tmp_path, options, model)
    loss = trainer.training_step(model, dict(batch), num_items_in_batch=16)
    found = gradients_of(model)
    model.zero_grad()
    shapes = trainer.subnets.sampler.shapes(0)
    plain_step(elastic, model, batch, shapes, options)
    expected = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        rounding = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=rounding, msg=lambda text, name=name: f"{name}: {text}"
        )
    hard = model(**batch).loss  # transformers' own
    torch.testing.assert_close(loss, hard.detach())


def test_a_largest_subnet_that_only_teaches_stays_the_base_and_the_others_learn_as_before(tmp_path: Path):
    shapes = [SubnetShape.parse(text) for text in ("4x1", "3x3/4", "2x1/2")]
    batch = {name: torch.tensor([row[name] for row in make_rows(4)]) for name in ("input_ids", "labels")}
    elastic = make_elastic()
    model = add_smol(elastic, router_noise=False, adapt_largest=False)
    base = elastic.model(batch["input_ids"]).logits.detach()
    with model.disable_adapter():
        assert torch.equal(elastic.model(batch["input_ids"]).logits, base)
    plain_step(elastic, model, batch, shapes, PAPER)  # at the largest, all gradients are 0 times something
    expected = gradients_of(model)
    model.zero_grad()
    trainer = make_trainer(elastic, tmp_path, dataclasses.replace(PAPER, train_largest=False), model)
    trainer.subnets.sampler = mock.Mock(shapes=lambda step, micro_step: shapes)
    trainer.training_step(model, dict(batch), num_items_in_batch=20)
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    trainer.train()
    assert torch.equal(elastic.model.eval()(batch["input_ids"]).logits, base)


def test_every_way_to_the_logits_gives_the_same_gradients(tmp_path: Path):
    gradients = []
    for chunked, keeps in ((True, True), (False, True), (False, False)):
        elastic = make_elastic()
        trainer = make_trainer(elastic, tmp_path)
        assert trainer.subnets.chunked
        trainer.subnets.chunked, trainer.subnets.keeps_logits = chunked, keeps
        trainer.training_step(elastic.model, PaddingCollator()(make_rows(3)), 15)
        gradients.append(gradients_of(elastic.model))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize(("checkpointing", "all_tokens"), [(False, False), (True, False), (False, True)])
def test_accumulation_equals_one_large_batch(tmp_path: Path, checkpointing: bool, all_tokens: bool):
    results = []
    rows = [*make_rows(1, targets=2), *make_rows(2, targets=9, seed=1), *make_rows(1, targets=4, seed=2)]
    for batch, accumulation in ((4, 1), (2, 2)):
        elastic = make_elastic()
        options = OneForAllOptions(
            num_random=0, loss_balancing=False, distill_all_tokens=all_tokens, kd_weight=0.7
        )  # else every micro-batch has its own shapes, ratios
        trainer = make_trainer(
            elastic, tmp_path, options, rows=rows, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, max_steps=1, optim="sgd", gradient_checkpointing=checkpointing,
        )  # fmt: skip
        loss = trainer.train().training_loss
        results.append(parameters_of(elastic.model) | {"loss": torch.tensor(loss)})
    torch.testing.assert_close(*results)
    assert any((results[0][name] != value).any() for name, value in make_elastic().model.named_parameters())


def test_batches_without_a_target_are_skipped(tmp_path: Path):
    elastic = make_elastic()
    trainer = make_trainer(elastic, tmp_path)
    batch = PaddingCollator()(make_rows(2, targets=0))
    assert trainer.training_step(elastic.model, batch, 0).item() == 0.0
    assert not gradients_of(elastic.model)


def test_batches_without_a_target_are_run_where_fsdp_waits_for_their_backward(tmp_path: Path):
    """Of one process too: the gradients of the micro-batches before are exchanged with the step's last one."""
    elastic = make_elastic()
    trainer = make_trainer(elastic, tmp_path)
    trainer.is_fsdp_enabled = True
    with mock.patch.object(trainer.subnets, "run") as run:
        trainer.training_step(elastic.model, PaddingCollator()(make_rows(2, targets=0)), 0)
    run.assert_called_once()


@pytest.mark.parametrize("shape", ["4x1", "2x1/2"])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path, shape: str):
    elastic = make_elastic()
    before = parameters_of(elastic.model)

    def spoil(active: object):
        elastic.model.lm_head.weight.data.copy_(before["lm_head.weight"] * (math.nan if str(active) == shape else 1))

    elastic.on_shape_change(spoil)
    trainer = make_trainer(elastic, tmp_path)
    with pytest.raises(TrainingError, match=f"loss of subnet {shape} is nan at step 0"):
        trainer.train()
    assert elastic.shape == elastic.space.largest
    assert not gradients_of(elastic.model)
    spoil(None)
    torch.testing.assert_close(parameters_of(elastic.model), before, rtol=0, atol=0)


def test_only_one_subnet_is_alive_at_a_time(tmp_path: Path):
    elastic = make_elastic()
    events = []
    elastic.on_shape_change(lambda shape: events.append(str(shape)))
    elastic.model.model.norm.register_full_backward_hook(lambda *_: events.append("backward"))
    trainer = make_trainer(elastic, tmp_path)
    events.clear()
    trainer.training_step(elastic.model, PaddingCollator()(make_rows(2)), 10)
    assert events[1::2] == ["backward"] * 4
    assert events[0] == events[-1] == "4x1"
    assert events[6] == "2x1/2"


# As a Trainer


def test_every_subnet_is_named_in_the_logs(tmp_path: Path):
    elastic = make_elastic()
    trainer = make_trainer(elastic, tmp_path, model=add_smol(elastic), max_steps=3, logging_steps=3)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    drawn = {str(shape) for step in range(3) for shape in trainer.sampler.shapes(step)}
    assert {name.removeprefix("loss/") for name in log if name.startswith("loss/")} == drawn
    assert {name.removeprefix("balance/") for name in log if name.startswith("balance/")} == drawn - {"4x1"}
    assert sum(log[f"router/2x1/2/expert_{index}"] for index in range(3)) == pytest.approx(1, abs=1e-5)
    assert log["loss/4x1"] == pytest.approx(log["loss"], abs=1e-5)
    assert "loss/2x1/2" in drawn | set(log)


class Interruption(TrainerCallback):
    """Stops a run after some steps, without shortening its plan."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("adapter", ["none", "smol"])
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path: Path, adapter: str):
    fields = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2,
              "per_device_train_batch_size": 2, "max_grad_norm": 1.0, "lr_scheduler_type": "linear"}  # fmt: skip

    def run(directory: str, callbacks: list[TrainerCallback] | None = None, **more: Any):
        elastic = make_elastic(attention_dropout=0.1)
        model = add_smol(elastic, lora_dropout=0.1) if adapter == "smol" else elastic.model
        arguments = make_arguments(tmp_path / directory, **fields, **more)
        train_one_for_all(elastic, model, make_rows(), PAPER, arguments, callbacks=callbacks)
        return parameters_of(model)

    whole, again = run("whole"), run("again")
    run("resumed", [Interruption(2)])
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    state = json.loads((tmp_path / "whole" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-5").iterdir()}
    assert ("adapter_model.safetensors" in files) == (adapter == "smol")


def test_training_helps_every_shape_and_leaves_the_model_as_found(tmp_path: Path):
    elastic = make_elastic()
    model = add_smol(elastic).eval()
    elastic.model.config.use_cache = True
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = make_rows(4, targets=11) + make_rows(2, targets=5, length=9)
    batch = PaddingCollator()(rows)

    def losses():
        with torch.no_grad():
            return [run(shape) for shape in elastic.space]

    def run(shape: str):
        with elastic.active(shape):
            return model(**batch).loss.item()

    before = losses()
    model.eval()
    elastic.set_shape("3x3/4")
    arguments = make_arguments(tmp_path, max_steps=40, learning_rate=0.02, bf16=True, gradient_checkpointing=True)
    with torch.no_grad():  # as inside a recipe's stage
        output = train_one_for_all(elastic, model, rows, PAPER, arguments, eval_dataset=rows)
    assert output.global_step == 40
    assert elastic.shape == elastic.space.largest
    assert not any(module.training for layer in elastic.layers for module in layer.modules())
    assert not model.training
    assert not elastic.model.model.layers.training
    assert elastic.model.config.use_cache
    assert not elastic.model.is_gradient_checkpointing
    assert not elastic.model.get_input_embeddings()(torch.tensor([1])).requires_grad
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert not gradients_of(model)
    assert "forward" not in vars(model)
    assert all(after < 0.9 * loss for after, loss in zip(losses(), before, strict=True))


def test_evaluation_runs_at_the_largest(tmp_path: Path):
    elastic = make_elastic()
    rows = make_rows(4)
    arguments = make_arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer = OneForAllTrainer(
        elastic.model,
        elastic,
        PAPER,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PaddingCollator(),
    )
    trainer.train()
    elastic.set_shape("2x1/2")
    found = trainer.evaluate()["eval_loss"]
    assert elastic.shape == SubnetShape.parse("2x1/2")
    with elastic.active("4x1"), torch.no_grad():
        assert found == pytest.approx(elastic.model(**PaddingCollator()(rows)).loss.item(), abs=1e-5)
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 3


@pytest.mark.parametrize("adapter", ["none", "smol"])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, adapter: str):
    elastic = make_elastic()
    model = add_smol(elastic, task_type="CAUSAL_LM") if adapter == "smol" else elastic.model
    arguments = make_arguments(
        tmp_path, max_steps=4, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    rows = make_rows(4, seed=5)
    trainer = OneForAllTrainer(model, elastic, PAPER, args=arguments, train_dataset=make_rows(), eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses) == trainer.evaluate()["eval_loss"]


def test_plain_lora_trains_where_only_depth_is_elastic(tmp_path: Path):
    elastic = make_elastic()
    narrow = dataclasses.replace(elastic.strategy.width, units={Fraction(1): {}})
    elastic.strategy = dataclasses.replace(elastic.strategy, width=narrow)
    model = get_peft_model(elastic.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    output = train_one_for_all(elastic, model, make_rows(), PAPER, make_arguments(tmp_path))
    assert output.global_step == 2


# Bad input


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


def test_all_layers_are_trained_whatever_shape_is_active_before(tmp_path: Path):
    found = []
    for shape in ("4x1", "2x1/2"):
        elastic = make_elastic()
        trainer = make_trainer(elastic, tmp_path)
        elastic.set_shape(shape)
        trainer.train()
        found.append(parameters_of(elastic.model))
    assert all(torch.equal(found[1][name], expected) for name, expected in found[0].items())


def test_all_layers_are_moved_to_the_device_whatever_shape_is_active_before(tmp_path: Path):
    elastic = make_elastic()
    elastic.set_shape("2x1/2")
    moved: list[int] = []
    with mock.patch.object(PreTrainedModel, "to", lambda self, *_: moved.append(len(self.model.layers)) or self):
        make_trainer(elastic, tmp_path)
    assert moved == [4]
    assert str(elastic.shape) == "2x1/2"


@pytest.mark.parametrize("adapter", [False, True])
def test_a_compiled_training_gives_the_same_parameters(tmp_path: Path, adapter: bool):
    """With logits as a whole: the head that takes the loss would be exchanged under the compiled graph."""
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        elastic = make_elastic()
        model = add_smol(elastic, router_noise=False) if adapter else elastic.model
        fields = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = make_trainer(elastic, tmp_path, model=model, **fields)
        assert trainer.subnets.chunked != compiled
        trainer.train()
        found.append(parameters_of(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


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
def test_useless_data_is_refused(tmp_path: Path, rows: list[Row], message: str):
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


def test_a_term_of_ones_own_goes_into_training_step(tmp_path: Path):
    class Decayed(OneForAllTrainer):
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            self.accelerator.backward(0.1 * model.lm_head.weight.square().sum())
            return super().training_step(model, *args, **kwargs)

    gradients = []
    for kind in (OneForAllTrainer, Decayed):
        elastic = make_elastic()
        trainer = kind(elastic.model, elastic, PAPER, args=make_arguments(tmp_path), train_dataset=make_rows())
        trainer.training_step(elastic.model, PaddingCollator()(make_rows(2)), 10)
        gradients.append(gradients_of(elastic.model)["lm_head.weight"])
    torch.testing.assert_close(gradients[1] - gradients[0], 0.2 * elastic.model.lm_head.weight.detach())


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


def test_logits_are_picked_where_they_come_out_of_a_model_on_several_devices(tmp_path: Path):
    elastic = make_elastic()
    assert make_trainer(elastic, tmp_path).subnets.keeps_logits
    elastic.model.hf_device_map = {"model": 0, "lm_head": 1}
    assert not make_trainer(elastic, tmp_path).subnets.keeps_logits


def test_rows_of_any_lengths_are_padded_without_a_collator(tmp_path: Path):
    rows = make_rows(2) + make_rows(2, targets=3, length=8)
    found = []
    for collator in (None, PaddingCollator(7)):
        elastic = make_elastic(pad_token_id=7)
        trainer = OneForAllTrainer(
            elastic.model, elastic, PAPER, args=make_arguments(tmp_path), train_dataset=rows, eval_dataset=rows,
            data_collator=collator,
        )  # fmt: skip
        trainer.train()
        found.append(parameters_of(elastic.model) | {"evaluated": torch.tensor(trainer.evaluate()["eval_loss"])})
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.parametrize("every", [None, 2])
def test_the_devices_cache_is_emptied_as_often_as_trainer_does(tmp_path: Path, every: int | None):
    counts = []
    for kind, where in (
        (OneForAllTrainer, "amoeba_plugin.training.one_for_all.trainer"),
        (Trainer, "transformers.trainer"),
    ):
        elastic = make_elastic()
        arguments = make_arguments(
            tmp_path, torch_empty_cache_steps=every, max_steps=3, gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        )  # fmt: skip
        fields: dict[str, Any] = {"args": arguments, "train_dataset": make_rows()}
        with mock.patch(f"{where}.clear_device_cache") as clear:
            if kind is OneForAllTrainer:
                OneForAllTrainer(elastic.model, elastic, PAPER, **fields).train()
            else:
                Trainer(elastic.model, data_collator=PaddingCollator(), **fields).train()
        counts.append(clear.call_count)
    assert counts == ([0, 0] if every is None else [4, 4])


def test_going_on_from_the_last_checkpoint_passes_over_one_that_was_interrupted(tmp_path: Path):
    def run(steps: int, resume: str | bool | None = None) -> dict[str, Tensor]:
        elastic = make_elastic()
        trainer = make_trainer(elastic, tmp_path, save_strategy="steps", save_steps=1, max_steps=steps)
        assert trainer.train(resume_from_checkpoint=resume).global_step == steps
        return parameters_of(elastic.model)

    with pytest.raises(TrainingError, match="no checkpoint in .* was written to its end; start again"):
        run(3, True)
    expected = run(3)
    for name in ("optimizer.pt", "trainer_state.json"):
        (tmp_path / "checkpoint-3" / name).unlink()
    with pytest.raises(TrainingError, match="checkpoint-3 was not written to its end; go on from .*checkpoint-2"):
        run(3, str(tmp_path / "checkpoint-3"))
    found = run(3, True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_optimizer_with_modes_trains_in_its_own(tmp_path: Path):
    """Schedule-free ones refuse to step otherwise; Trainer sets the other mode to evaluate."""
    modes: list[str] = []

    class WithModes(torch.optim.SGD):
        def train(self) -> None:
            modes.append("train")

        def eval(self) -> None:
            modes.append("eval")

        def step(self, closure: Any = None) -> None:
            assert modes[-1] == "train"
            super().step(closure)

    elastic = make_elastic()
    optimizer = WithModes(elastic.model.parameters(), lr=0.01)
    trainer = OneForAllTrainer(
        elastic.model, elastic, PAPER, args=make_arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=make_rows(), eval_dataset=make_rows(), data_collator=PaddingCollator(),
        optimizers=(optimizer, None),
    )  # fmt: skip
    assert trainer.train().global_step == 2
    assert {"train", "eval"} == set(modes)


def test_label_smoothing_is_refused(tmp_path: Path):
    with pytest.raises(TrainingError, match="label_smoothing_factor is not supported"):
        make_trainer(make_elastic(), tmp_path, label_smoothing_factor=0.1)
