"""One training of an ablation, and what every shape loses on held-out text before and after it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from subjects import Subject
from transformers import TrainingArguments

from amoeba_plugin.calibration import Batch, collect_statistics
from amoeba_plugin.checkpoint import attach_smol
from amoeba_plugin.elastic import ElasticModel
from amoeba_plugin.gradients import loss_gradients
from amoeba_plugin.importance import GroupImportance
from amoeba_plugin.plugins import architecture_for, importance_named, objective_named
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.strategy import DepthStrategy, SubnetStrategy, WidthStrategy, model_fingerprint
from amoeba_plugin.training import OneForAllOptions, train_one_for_all
from amoeba_plugin.width import coupled_parameters, rank_widths

Losses = dict[str, float]  # held-out loss in nats per token, by shape
ONE_FOR_ALL = {"num_experts": 3, "top_k": 3, "router_noise": False, "router_init": "widths"}  # as the demo's recipe
ONE_LORA = {"num_experts": 1, "top_k": 1, "router_noise": False}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STUDENTS = 3  # subnets that learn in one step of one-for-all training: two random ones and the smallest


@dataclass(frozen=True)
class Variant:
    """How subnets are trained.

    Args:
        name: In the table.
        adapter: Fields of ``SmolConfig`` beside the rank; ``rank_factor`` multiplies the subject's rank.
        options: Fields of ``OneForAllOptions``.
        own_training: ``None``: one training for all shapes. Else each shape is trained alone: "shared" divides the
            passes of one-for-all training by the number of shapes, "each" gives every shape all of them.
    """

    name: str
    adapter: Mapping[str, Any] = field(default_factory=lambda: ONE_FOR_ALL)
    options: Mapping[str, Any] = field(default_factory=dict)
    own_training: str | None = None
    rank_factor: int = 1


def select_widths(subject: Subject, calibration: Sequence[Batch], importance: str = "flap") -> WidthStrategy:
    """Rank units on one text."""
    model = subject.model()
    adapter = architecture_for(model.config.model_type)
    scored = importance_named(importance)
    statistics = collect_statistics(model, adapter, calibration)
    gradients = {}
    if isinstance(scored, GroupImportance) and scored.needs_gradients:
        gradients = loss_gradients(model, coupled_parameters(model, adapter), calibration)
    return rank_widths(
        model, adapter, statistics, gradients=gradients, widths=subject.widths, importance=scored,
        round_to=subject.round_to,
    )  # fmt: skip


def train(
    subject: Subject, variant: Variant, depth: DepthStrategy, width: WidthStrategy, shapes: Sequence[str], seed: int
) -> Losses:
    """Train as a variant says and return the held-out loss of every shape."""
    trained = [shape for shape in shapes if shape != f"{subject.depths[0]}x1"]
    if variant.own_training is None:
        elastic = _elastic(subject, depth, width, subject.depths, subject.widths[:3])
        _train(subject, variant, elastic, subject.steps, seed, num_random=STUDENTS - 1)
        return measure(subject, elastic, shapes)
    passes = STUDENTS * subject.steps // (len(trained) if variant.own_training == "shared" else 1)
    losses: Losses = {}
    for shape in trained:
        parsed = SubnetShape.parse(shape)
        elastic = _elastic(subject, depth, width, (subject.depths[0], parsed.depth), (Fraction(1), parsed.width))
        _train(subject, variant, elastic, passes, seed, num_random=0)
        losses |= measure(subject, elastic, [shape])
    return losses


def untrained(subject: Subject, depth: DepthStrategy, width: WidthStrategy, shapes: Sequence[str]) -> Losses:
    """Return the held-out loss of every shape as selection leaves it."""
    return measure(subject, _elastic(subject, depth, width, depth.kept, subject.widths), shapes)


def measure(subject: Subject, elastic: ElasticModel, shapes: Sequence[str]) -> Losses:
    """Return the held-out loss of shapes of an elastic model."""
    losses = {}
    for shape in shapes:
        with elastic.active(shape) as model:
            losses[shape] = objective_named("loss").measure(model.eval(), subject.held_out).value
    return losses


def _elastic(
    subject: Subject, depth: DepthStrategy, width: WidthStrategy, depths: Sequence[int], widths: Sequence[Fraction]
) -> ElasticModel:
    """Return an elastic model whose space has just these depths and widths."""
    model = subject.model()
    fingerprint = model_fingerprint(model, architecture_for(model.config.model_type))
    kept = DepthStrategy({count: depth.kept[count] for count in sorted(set(depths), reverse=True)})
    units = {share: width.units[share] for share in sorted(set(widths), reverse=True)}
    narrowed = WidthStrategy(units, width.order, width.mean_input, width.importance, width.allocation)
    return ElasticModel(model, SubnetStrategy(kept, narrowed, fingerprint))


def _train(subject: Subject, variant: Variant, elastic: ElasticModel, steps: int, seed: int, num_random: int) -> None:
    torch.manual_seed(seed)
    rank = subject.rank * variant.rank_factor
    options = {"train_largest": False, "num_random": num_random, **variant.options}
    config = SmolConfig(
        r=rank, lora_alpha=rank, adapt_largest=options["train_largest"], router_seed=seed,
        target_modules=LINEARS, task_type="CAUSAL_LM", **variant.adapter,
    )  # fmt: skip
    peft_model = attach_smol(elastic, config)
    rows = [{name: torch.tensor(row[name]) for name in ("input_ids", "labels")} for row in subject.training]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=4, learning_rate=subject.learning_rate,
            lr_scheduler_type="linear", warmup_steps=5, max_grad_norm=1.0, seed=seed, data_seed=seed,
            save_strategy="no", report_to=[], remove_unused_columns=False, dataloader_pin_memory=False,
            logging_strategy="no", disable_tqdm=False,
        )  # fmt: skip
        train_one_for_all(elastic, peft_model, rows, OneForAllOptions(**options), arguments)
    peft_model.eval()
