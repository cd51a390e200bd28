"""One training of an ablation, and what every shape loses before and after it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from peft import PeftModel
from results import Losses, Results
from subjects import Subject
from transformers import TrainingArguments

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.repairs import Repairs
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.registry import objective_named
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.train import train_one_for_all

FACTORS = {"combination": "factors"}  # the reference code's mixture
ONE_FOR_ALL = {"num_experts": 3, "top_k": 3, "router_noise": False, "router_init": "widths"} | FACTORS
AS_THE_REFERENCE_DRAWS = {"sampled_shapes": "independent"}
ONE_LORA = {"num_experts": 1, "top_k": 1, "router_noise": False}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STUDENTS = 3  # subnets that learn in one step of one-for-all training: two random ones and the smallest
ON_VALIDATION = " on validation"
TRIAL_SEED = 1000  # of the trainings that learning rates are chosen by; none of them is reported


@dataclass(frozen=True)
class Variant:
    """How subnets are trained.

    Args:
        name: In the table.
        adapter: Fields of ``SmolConfig`` beside the rank; ``rank_factor`` multiplies the subject's rank.
        options: Fields of ``OneForAllOptions``.
        students: Subnets that learn in one step: the smallest, and random ones.
    """

    name: str
    adapter: Mapping[str, Any] = field(default_factory=lambda: ONE_FOR_ALL)
    options: Mapping[str, Any] = field(default_factory=dict)
    rank_factor: int = 1
    students: int = STUDENTS

    @property
    def capacity(self) -> tuple[Mapping[str, Any], int]:
        """What is trained, whatever the objective."""
        return self.adapter, self.rank_factor


@dataclass(frozen=True)
class Space:
    """An elastic model to be: strategies, and which of their depths and widths it shall have."""

    depth: DepthStrategy
    width: WidthStrategy
    depths: Sequence[int]
    widths: Sequence[Fraction]
    repairs: Repairs = field(default_factory=Repairs)

    def of_one(self, shape: str) -> Space:
        """Return the space of the whole model and one shape."""
        parsed, whole = SubnetShape.parse(shape), max(self.depths)
        return replace(self, depths=(whole, parsed.depth), widths=(Fraction(1), parsed.width))

    def elastic(self, subject: Subject) -> ElasticModel:
        """Make a new elastic model of the subject's."""
        model = subject.model()
        fingerprint = model_fingerprint(model, architecture_for(model.config.model_type))
        kept = DepthStrategy({count: self.depth.kept[count] for count in sorted(set(self.depths), reverse=True)})
        units = {share: self.width.units[share] for share in sorted(set(self.widths), reverse=True)}
        narrowed = WidthStrategy(
            units, self.width.order, self.width.mean_input, self.width.importance, self.width.allocation,
            bias_compensation=self.width.bias_compensation,
        )  # fmt: skip
        space = ShapeSpace(tuple(kept.kept), tuple(units))
        held = {place: each for place, each in self.repairs.weights.items() if place[1] in space.widths}
        repairs = replace(self.repairs, weights=held)
        return ElasticModel(model, SubnetStrategy(kept, narrowed, fingerprint, repairs=repairs))


def untrained(subject: Subject, space: Space, shapes: Sequence[str]) -> Losses:
    """Return the held-out loss of every shape as selection leaves it."""
    return measure(space.elastic(subject), shapes, subject.held_out)


def trained(
    subject: Subject, results: Results, variant: Variant, space: Space, shapes: Sequence[str], *,
    key: str, seeds: Sequence[int], steps: int, rates: str | None = None,
) -> list[Losses]:  # fmt: skip
    """Return every seed's losses after training at the best learning rate, held-out and, by another name, validation.

    Args:
        subject: What is trained.
        results: Where results are kept.
        variant: How it is trained.
        space: What can be drawn.
        shapes: What is measured.
        key: Names the training in the results.
        seeds: Of the adapter's initialisation, the data's order, and the shapes drawn.
        steps: Optimizer steps.
        rates: The key of another training, whose learning rate is taken; of this one where none has been tried.
    """

    def run(seed: int, rate: float) -> Losses:
        elastic = space.elastic(subject)
        train(subject, variant, elastic, steps, seed, rate)
        return evaluated(subject, elastic, shapes)

    def trial(rate: float) -> float:
        losses = results.of(f"{rates or key}/rate {rate}", lambda: run(TRIAL_SEED, rate))
        return sum(loss for name, loss in losses.items() if name.endswith(ON_VALIDATION))

    best = min(subject.learning_rates, key=trial)
    return [results.of(f"{key}/{best}/{seed}", lambda seed=seed: run(seed, best)) for seed in seeds]


def evaluated(subject: Subject, elastic: ElasticModel, shapes: Sequence[str]) -> Losses:
    """Return the held-out loss of shapes and, by another name, that on the validation text."""
    validation = measure(elastic, shapes, subject.validation)
    return measure(elastic, shapes, subject.held_out) | {on_validation(shape): validation[shape] for shape in shapes}


def on_validation(shape: str) -> str:
    """Return the name of a shape's loss on the text that choices are made on."""
    return shape + ON_VALIDATION


def measure(elastic: ElasticModel, shapes: Sequence[str], batches: Sequence[Batch]) -> Losses:
    """Return the loss of shapes of an elastic model."""
    losses = {}
    for shape in shapes:
        with elastic.active(shape) as model:
            losses[shape] = objective_named("loss").measure(model.eval(), batches).value
    return losses


def train(subject: Subject, variant: Variant, elastic: ElasticModel, steps: int, seed: int, rate: float) -> PeftModel:
    """Train an elastic model's adapter; it is left ready to be measured."""
    torch.manual_seed(seed)
    rank = subject.rank * variant.rank_factor
    options = {"train_largest": False, "num_random": variant.students - 1} | AS_THE_REFERENCE_DRAWS | variant.options
    config = SmolConfig(
        r=rank, lora_alpha=rank, adapt_largest=options["train_largest"], router_seed=seed,
        target_modules=LINEARS, task_type="CAUSAL_LM", **variant.adapter,
    )  # fmt: skip
    peft_model = attach_smol(elastic, config)
    rows = [{name: torch.tensor(row[name]) for name in ("input_ids", "labels")} for row in subject.training]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=4, learning_rate=rate,
            lr_scheduler_type="linear", warmup_steps=5, max_grad_norm=1.0, seed=seed, data_seed=seed,
            save_strategy="no", report_to=[], remove_unused_columns=False, dataloader_pin_memory=False,
            logging_strategy="no", disable_tqdm=False,
        )  # fmt: skip
        train_one_for_all(elastic, peft_model, rows, OneForAllOptions(**options), arguments)
    return peft_model.eval()
