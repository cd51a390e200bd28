"""One micro-batch of one-for-all training: the largest, some random and the smallest subnet, the largest as teacher.

(AmoebaLLM, arXiv:2411.10606: sandwich sampling, in-place distillation, loss-magnitude balancing.) Each subnet runs
forward and backward before the next one is active, so that only one subnet's activations are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.data.tokens import TOKEN_COLUMNS, require_tokens
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import DataError, TrainingError
from amoeba_plugin.models.adapter import text_model
from amoeba_plugin.models.finite import not_finite
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.smol.router_weights import RouterWeights
from amoeba_plugin.training.head_loss import HeadLoss, logits_at
from amoeba_plugin.training.next_token import Positions, RowLoss, next_token_rows, sum_over_rows, target_positions
from amoeba_plugin.training.one_for_all.losses import DIVERGENCES, balance, distilled_rows
from amoeba_plugin.training.one_for_all.metrics import GradientConflict, SubnetMeans
from amoeba_plugin.training.one_for_all.micro_batch import MicroBatch
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.sandwich import SandwichSampler, step_seed


@dataclass
class StepHost:
    """What the loop around a step provides; as it is, one process and a plain backward.

    Attributes:
        backward: Differentiates a loss; accelerate's scales it where training is in fp16.
        synchronized: Context of a subnet's forward and backward, given the model as wrapped for training and whether it
            is the micro-batch's last: gradients are exchanged between processes with the last one only.
        mean_over_processes: Mean of a loss over the positions of all processes, given this one's and their number.
        dtype: The half precision that autocast computes in; None: the model's own dtype.
    """

    backward: Callable[[Tensor], Any] = torch.Tensor.backward
    synchronized: Callable[[nn.Module, bool], AbstractContextManager[Any]] = field(
        default=lambda model, last: nullcontext()
    )
    mean_over_processes: Callable[[Tensor, int], Tensor] = field(default=lambda loss, count: loss)
    dtype: torch.dtype | None = None


class Outcome(NamedTuple):
    """What the forward and backward of one subnet gave: () fp32 each, without a gradient."""

    loss: Tensor  # before balancing, of this process
    overall: Tensor  # the same, of all processes
    scale: Tensor  # the balancing ratio


class SubnetStep:
    """Adds up the gradients of all subnets of a micro-batch.

    Args:
        model: What is trained: the elastic model's own, or the ``PeftModel`` around it.
        elastic: Switches its shape.
        options: Of the objective and the sampling.
        seed: Of the sampling and the routers' noise.
        host: What the loop around it provides.
        may_chunk: False where the loop needs a subnet's logits as a whole.

    Attributes:
        means: Running means, as they are logged: ``loss/SHAPE`` before balancing, ``balance/SHAPE`` (the ratio),
            ``conflict/SHAPE~SHAPE`` (cosine of gradients), ``load_balancing`` (the routers' term).
        head_loss: How a subnet's loss is taken.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        elastic: ElasticModel,
        options: OneForAllOptions,
        seed: int,
        host: StepHost,
        may_chunk: bool = True,
    ) -> None:
        self.elastic, self.options, self.seed, self.host = elastic, options, seed, host
        elastic.share_repairs()
        space = elastic.space
        self.sampler = SandwichSampler(space, options.num_random, seed, _sampled(space, options.sampled_shapes))
        self.means = SubnetMeans()
        inner = text_model(model)
        assert isinstance(inner, PreTrainedModel)
        self._model, self._inner = model, inner
        self._routers = [module for module in model.modules() if isinstance(module, RouterWeights)]
        self.head_loss = HeadLoss(inner, may_chunk)

    def positions(self, inputs: Mapping[str, Any]) -> Positions:
        """Return where a micro-batch, labels included, has losses.

        Raises:
            DataError: If it has no tokens or no labels, they do not align, or one is not of the model's.
        """
        labels = inputs.get("labels")
        if labels is None or "input_ids" not in inputs:
            raise DataError(
                f"a training batch has {', '.join(inputs)}, but no {'labels' if labels is None else 'input_ids'}; give "
                "columns 'input_ids' and 'labels', one of each per token"
            )
        if labels.shape != inputs["input_ids"].shape:
            raise DataError(
                f"a training batch has input_ids {tuple(inputs['input_ids'].shape)} and labels {tuple(labels.shape)}; "
                "give one label per token, -100 where nothing is to be predicted"
            )
        for name in TOKEN_COLUMNS:
            require_tokens(inputs[name], name, "a training batch", self.elastic.config.vocab_size)
        mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
        return target_positions(labels, mask, self.options.distill_all_tokens, places)

    def begin(self, place: tuple[int, int]) -> None:
        """Activate the largest shape, with the routers' noise of this micro-batch.

        :meth:`run` does it itself, unless the largest subnet's forward has been run by somebody else: after this.

        Args:
            place: Optimizer steps done so far, and micro-batches of the current one.
        """
        for router in self._routers:
            router.seed_noise(step_seed(self.seed, *place))
        self.elastic.set_shape(self.elastic.space.largest)

    def run(self, batch: MicroBatch, largest_logits: Tensor | None = None) -> Tensor:
        """Run forward and backward of every subnet; the largest shape is active at the end.

        Args:
            batch: What they are run on.
            largest_logits: (batch, length, vocabulary) of the largest subnet, where its forward has been run already,
                after :meth:`begin`.

        Returns:
            The largest subnet's next-token cross-entropy times its share of the targets: () fp32.

        Raises:
            TrainingError: If a loss or a balancing ratio is not finite; the gradients are cleared, the parameters
                untouched.
        """
        if largest_logits is None:
            self.begin(batch.place)
        shapes = self.sampler.shapes(*batch.place)
        (step, micro_step), every = batch.place, self.options.conflict_every
        conflict = GradientConflict(batch.model.parameters()) if every and not (step % every or micro_step) else None
        try:
            outcomes = self._run_subnets(batch, shapes, conflict, largest_logits)
        finally:
            self.elastic.set_shape(self.elastic.space.largest)
        self._require_finite(batch, shapes, outcomes)
        for name, cosine in conflict.cosines() if conflict is not None else ():
            self.means.add(f"conflict/{name}", cosine)
        return outcomes[0].loss * batch.share.targets

    def _run_subnets(
        self,
        batch: MicroBatch,
        shapes: Sequence[SubnetShape],
        conflict: GradientConflict | None,
        largest_logits: Tensor | None,
    ) -> list[Outcome]:
        # total = L_1 + sum_i stopgrad(L_1 / L_i) L_i: gradients add up, one subnet's activations are alive
        teacher = KeptLogits(len(batch.positions.rows), self._compute_dtype())
        outcomes = [self._teach(batch, teacher, largest_logits, last=len(shapes) == 1)]
        if conflict is not None and self.options.train_largest:
            conflict.after(shapes[0])
        for number, shape in enumerate(shapes[1:], start=2):
            outcomes.append(self._learn(batch, shape, teacher, outcomes[0].overall, last=number == len(shapes)))
            if conflict is not None:
                conflict.after(shape)
        for shape, outcome in zip(shapes, outcomes, strict=True):
            self.means.add(f"loss/{shape}", outcome.overall)
        return outcomes

    def _teach(self, batch: MicroBatch, teacher: KeptLogits, logits: Tensor | None, last: bool) -> Outcome:
        """Let the largest subnet learn from the labels, and keep its logits for the others to learn from.

        Args:
            batch: What it is run on.
            teacher: Written where this step distils.
            logits: (batch, length, vocabulary), where its forward has been run already.
            last: There is no other subnet.
        """
        positions, learns = batch.positions, self.options.train_largest
        row_loss = next_token_rows(positions, teacher.write if self.options.kd_weight_at(batch.step) else None)
        with self.host.synchronized(batch.model, last), torch.set_grad_enabled(learns):
            if logits is None:
                loss = self._loss(batch, row_loss)
            else:
                loss = sum_over_rows(row_loss, logits_at(logits, positions), positions.rows)
            overall = self.host.mean_over_processes(loss.detach(), positions.num_targets)
            if learns:
                self._backward(loss, batch.share.targets, last)
        return Outcome(loss.detach(), overall, torch.ones_like(overall))

    def _learn(
        self, batch: MicroBatch, shape: SubnetShape, teacher: KeptLogits, largest_loss: Tensor, last: bool
    ) -> Outcome:
        """Let a subnet learn from the teacher, its loss balanced against the largest subnet's, () fp32."""
        positions = batch.positions
        with self.host.synchronized(batch.model, last), torch.enable_grad():
            self.elastic.set_shape(shape)
            loss = self._loss(batch, self._distilled_rows(batch, teacher))
            overall = self.host.mean_over_processes(loss.detach(), len(positions.rows))
            scale = torch.ones_like(overall)
            if self.options.loss_balancing:
                scale = balance(overall, largest_loss, self.options.max_balance_ratio)
                self.means.add(f"balance/{shape}", scale)
            self._backward(scale * loss, batch.share.distilled, last)
        return Outcome(loss.detach(), overall, scale)

    def _backward(self, loss: Tensor, weight: Tensor | float, last: bool) -> None:
        if last:
            loss = loss + self._load_balancing()
        self.host.backward(loss * weight)

    def _load_balancing(self) -> Tensor | float:
        """Return SMOL's ``router_load_balancing`` term, once per micro-batch: () fp32, or 0."""
        term = getattr(self._model, "load_balancing_loss", None)
        if term is None:
            return 0.0
        value: Tensor = term()
        if value.requires_grad:
            self.means.add("load_balancing", value.detach())
        return value

    def _distilled_rows(self, batch: MicroBatch, teacher: KeptLogits) -> RowLoss:
        options, positions = self.options, batch.positions
        weight = options.kd_weight_at(batch.step)
        targets = batch.share.targets_per_distilled if len(positions.rows) else 1.0
        divergence = DIVERGENCES[options.loss]
        return distilled_rows(positions, teacher.values, divergence, options.temperature, weight, targets)

    def _loss(self, batch: MicroBatch, row_loss: RowLoss) -> Tensor:
        return self.head_loss(batch.model, batch.inputs, batch.positions, row_loss)

    def _compute_dtype(self) -> torch.dtype:
        if self.host.dtype is not None:
            return self.host.dtype
        head = self._inner.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.dtype
        dtype: torch.dtype = self._inner.dtype
        return dtype

    def _require_finite(self, batch: MicroBatch, shapes: Sequence[SubnetShape], outcomes: Sequence[Outcome]) -> None:
        losses, scales = (torch.stack([getattr(each, name) for each in outcomes]) for name in ("loss", "scale"))
        finite = losses.isfinite() & scales.isfinite()  # (shapes,)
        count = max(1, batch.positions.num_targets)
        if not bool(self.host.mean_over_processes((~finite).sum().float(), count)):  # all stop, or none
            return
        batch.model.zero_grad()
        index = int((~finite).int().argmax())
        value = f"loss of subnet {shapes[index]} is {losses[index].item()}"
        if bool(losses[index].isfinite()):
            value = f"balancing ratio of subnet {shapes[index]} is {scales[index].item()} at a loss of {losses[index]}"
        if bool(finite.all()):
            value = "loss of a subnet is not finite in another process"
        advice = "Lower the learning rate, clip gradients (max_grad_norm), or do not train in fp16"
        weight = not_finite(self._model)
        if weight is not None:
            advice = f"Its weight {weight} is NaN or infinite somewhere: copy the model anew"
        raise TrainingError(
            f"the {value} at step {batch.step}; no parameter was changed by this step, and the checkpoints written "
            f"before are good. {advice}"
        )


class KeptLogits:
    """The teacher's logits at the positions that are distilled, once, in the dtype they were computed in."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self._rows, self._dtype = rows, dtype
        self.values = torch.empty(0)  # (rows, vocabulary)

    def write(self, place: slice, logits: Tensor) -> None:
        """Keep the logits, (n, vocabulary) fp32, of a slice of the rows."""
        if not len(self.values):
            # Losses see fp32 copies of half-precision logits; nothing is lost on the way back.
            self.values = logits.new_empty((self._rows, logits.shape[-1]), dtype=self._dtype)
        self.values[place] = logits


def _sampled(space: ShapeSpace, asked: Sequence[str]) -> tuple[SubnetShape, ...]:
    """Return the shapes to draw from; none where depth and width are drawn apart."""
    if asked == "independent":
        return ()
    if asked == "all":
        return tuple(space)[1:-1]  # the largest and the smallest are in every step anyway
    return tuple(space.require(shape) for shape in asked)
