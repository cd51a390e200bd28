"""The gradients of a step, against a plain implementation of what the paper says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import TrainingError
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.batches import make_rows
from support.training import PAPER, add_smol, gradients_of, make_arguments, make_elastic, make_trainer, parameters_of


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
        assert trainer.subnets.head_loss.chunked
        trainer.subnets.head_loss.chunked, trainer.subnets.head_loss.keeps_logits = chunked, keeps
        trainer.training_step(elastic.model, PaddingCollator()(make_rows(3)), 15)
        gradients.append(gradients_of(elastic.model))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_logits_are_picked_where_they_come_out_of_a_model_on_several_devices(tmp_path: Path):
    elastic = make_elastic()
    assert make_trainer(elastic, tmp_path).subnets.head_loss.keeps_logits
    elastic.model.hf_device_map = {"model": 0, "lm_head": 1}
    assert not make_trainer(elastic, tmp_path).subnets.head_loss.keeps_logits


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
