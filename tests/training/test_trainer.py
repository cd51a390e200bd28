"""One-for-all training as a Trainer: logs, evaluation, hosts' options, and what it leaves behind."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    PreTrainedModel,
    Trainer,
)

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.training.one_for_all import trainer
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.batches import make_rows
from support.training import PAPER, add_smol, gradients_of, make_arguments, make_elastic, make_trainer, parameters_of


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


@pytest.mark.parametrize("adapter", ["none", "smol"])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, adapter: str):
    elastic = make_elastic()
    model = add_smol(elastic, task_type="CAUSAL_LM") if adapter == "smol" else elastic.model
    arguments = make_arguments(
        tmp_path, max_steps=5, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    rows = make_rows(4, seed=3)
    trainer = OneForAllTrainer(model, elastic, PAPER, args=arguments, train_dataset=make_rows(), eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses) + 0.1
    assert min(losses) == trainer.evaluate()["eval_loss"]


def test_plain_lora_trains_where_only_depth_is_elastic(tmp_path: Path):
    elastic = make_elastic()
    narrow = dataclasses.replace(elastic.strategy.width, units={Fraction(1): {}})
    elastic.strategy = dataclasses.replace(elastic.strategy, width=narrow)
    model = get_peft_model(elastic.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    output = train_one_for_all(elastic, model, make_rows(), PAPER, make_arguments(tmp_path))
    assert output.global_step == 2


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
        assert trainer.subnets.head_loss.chunked != compiled
        trainer.train()
        found.append(parameters_of(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


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
    for kind, module in ((OneForAllTrainer, trainer), (Trainer, transformers.trainer)):
        elastic = make_elastic()
        arguments = make_arguments(
            tmp_path, torch_empty_cache_steps=every, max_steps=3, gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        )  # fmt: skip
        fields: dict[str, Any] = {"args": arguments, "train_dataset": make_rows()}
        with mock.patch.object(module, "clear_device_cache") as clear:
            if kind is OneForAllTrainer:
                OneForAllTrainer(elastic.model, elastic, PAPER, **fields).train()
            else:
                Trainer(elastic.model, data_collator=PaddingCollator(), **fields).train()
        counts.append(clear.call_count)
    assert counts == ([0, 0] if every is None else [4, 4])


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
