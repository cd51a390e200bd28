"""OneForAllTrainer: every micro-batch trains the largest, some random and the smallest subnet, the largest as teacher.

(AmoebaLLM, arXiv:2411.10606: sandwich sampling, in-place distillation, loss-magnitude balancing.) It is a
``transformers.Trainer``: what works there works here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from amoeba_plugin.architecture import text_model
from amoeba_plugin.batching import require_targets
from amoeba_plugin.distillation import (
    DIVERGENCES,
    Positions,
    balance,
    distilled_loss,
    next_token_loss,
    target_positions,
)
from amoeba_plugin.elastic import ElasticModel
from amoeba_plugin.errors import DataError, RecipeError, TrainingError
from amoeba_plugin.sampling import SandwichSampler, step_seed
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol.router import RouterWeights


@dataclass(frozen=True)
class OneForAllOptions:
    """What one-for-all training does beside what ``TrainingArguments`` say.

    Args:
        loss: What subnets learn from the largest: "soft_cross_entropy" (the paper), "kl", "reverse_kl" or
            "jensen_shannon".
        temperature: Divides both logits.
        kd_weight: Share of distillation in a subnet's loss, in [0, 1]; the rest is next-token cross-entropy.
        loss_balancing: Scale each subnet's loss to the size of the largest subnet's.
        max_balance_ratio: The largest scale; reached where a divergence goes to 0.
        distill_all_tokens: Distil every position, not just those before a target token.
        num_random: Random shapes per micro-batch, beside largest and smallest.
        train_largest: False: the largest subnet only teaches; it gets no backward pass. For an adapter that leaves the
            whole model alone (``SmolConfig.adapt_largest=False``).

    Raises:
        RecipeError: If a value is out of range.
    """

    loss: str = "soft_cross_entropy"
    temperature: float = 1.0
    kd_weight: float = 1.0
    loss_balancing: bool = True
    max_balance_ratio: float = 10.0
    distill_all_tokens: bool = False
    num_random: int = 2
    train_largest: bool = True

    def __post_init__(self) -> None:
        if self.loss not in DIVERGENCES:
            raise RecipeError(f"loss '{self.loss}' is unknown; choose one of {', '.join(DIVERGENCES)}")
        if not self.temperature > 0:
            raise RecipeError(
                f"temperature {self.temperature}: it divides logits, give a number above 0 (the paper: 1)"
            )
        if not 0 <= self.kd_weight <= 1:
            raise RecipeError(f"kd_weight {self.kd_weight}: give a share in [0, 1] (the paper: 1)")
        if not self.max_balance_ratio > 0:
            raise RecipeError(f"max_balance_ratio {self.max_balance_ratio}: give a number above 0")
        if self.num_random < 0:
            raise RecipeError(f"num_random {self.num_random}: give 0 or more (the paper: 2)")


class OneForAllTrainer(Trainer):
    """Trains all subnets of an elastic model at once.

    Each micro-batch draws its shapes; each subnet runs forward and backward before the next one is active, so that only
    one subnet's activations are alive. Between steps the largest shape is active: saving and evaluation see the whole
    model.

    The logged ``loss`` is the largest subnet's next-token cross-entropy. Beside it are logged, as means over the
    logging window, ``loss/SHAPE`` (before balancing) and ``balance/SHAPE`` (the ratio); for SMOL also
    ``router/SHAPE/expert_I``, the mixture without noise as it is now.

    Args:
        model: What is trained: the elastic model's own, or the ``PeftModel`` around it.
        elastic: Switches its shape.
        options: Of the objective and the sampling.
        trainer_kwargs: Of ``transformers.Trainer``: ``args``, ``train_dataset``, ``data_collator``, ...

    Raises:
        TrainingError: If the arguments ask for what this training cannot do, or the adapter does not follow the shape.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        elastic: ElasticModel,
        options: OneForAllOptions,
        **trainer_kwargs: Any,
    ) -> None:
        _require_follows(model, elastic)
        args = trainer_kwargs.get("args")
        if args is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # layers a subnet drops get no gradient from it
        super().__init__(model=model, **trainer_kwargs)
        _require_supported(self)
        self.elastic = elastic
        self.options = options
        self.sampler = SandwichSampler(elastic.space, options.num_random, self.args.seed)
        self._means = _Means()
        self._micro_step = (-1, 0)  # optimizer step, micro-batches of it seen so far
        self._routers = [module for module in model.modules() if isinstance(module, RouterWeights)]
        self._keeps_logits = "logits_to_keep" in signature(text_model(model).forward).parameters

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Trainer's; refuses a data set without a target token."""
        require_targets(self.train_dataset)
        self._micro_step = (-1, 0)
        return super().get_train_dataloader()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add up the gradients of all subnets of one micro-batch.

        Args:
            model: The model as wrapped for training.
            inputs: A micro-batch: ``input_ids``, ``labels``, each (batch, length) int64, perhaps an ``attention_mask``.
            num_items_in_batch: Target tokens of the whole optimizer step.

        Returns:
            The largest subnet's next-token cross-entropy times this micro-batch's share of the step's targets: () fp32.

        Raises:
            DataError: If the batch has no labels.
            TrainingError: If a loss is not finite; the gradients are cleared, the parameters untouched.
        """
        step, micro_step = self._next_micro_step()
        model.train()
        inputs = self._prepare_inputs(inputs)
        if inputs.get("labels") is None:
            raise DataError(
                f"a training batch has {', '.join(inputs)}, but no labels; add a column 'labels', one per token"
            )
        labels = inputs.pop("labels")
        positions = target_positions(labels, inputs.get("attention_mask"), self.options.distill_all_tokens)
        if positions.num_targets == 0 and self.accelerator.num_processes == 1:
            return torch.zeros((), device=labels.device)  # with several processes the others wait for our gradients
        for router in self._routers:
            router.generator.manual_seed(step_seed(self.args.seed, step, micro_step))
        shapes = self.sampler.shapes(step, micro_step)
        share = self._share(positions.num_targets, num_items_in_batch)
        try:
            losses = self._run_subnets(model, inputs, positions, shapes, share)
        finally:
            self.elastic.set_shape(self.elastic.space.largest)
        self._require_finite(losses, shapes, step)
        return losses[0] * share

    def _run_subnets(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        positions: Positions,
        shapes: list[SubnetShape],
        share: Tensor | float,
    ) -> Tensor:
        """Run forward and backward of every subnet in order; return their losses before balancing, (shapes,) fp32."""
        losses: list[Tensor] = []
        teacher = torch.empty(0)
        for index, shape in enumerate(shapes):
            learns = index > 0 or self.options.train_largest
            with self._synchronized(model, last=index == len(shapes) - 1), torch.set_grad_enabled(learns):
                self.elastic.set_shape(shape)
                logits = self._logits(model, inputs, positions)  # (batch * P, vocabulary)
                if index == 0:
                    loss = next_token_loss(logits, positions)
                    teacher = self._teacher(logits, positions)  # (N, vocabulary)
                    objective = loss
                else:
                    divergence = DIVERGENCES[self.options.loss]
                    loss = distilled_loss(
                        logits, positions, teacher, divergence, self.options.temperature, self.options.kd_weight
                    )
                    objective = self._balanced(loss, losses[0], shape)
                if index == len(shapes) - 1:
                    objective = objective + self._load_balancing()
                del logits
                losses.append(loss.detach())
                self._means.add(f"loss/{shape}", losses[-1])
                # total = L_1 + sum_i stopgrad(L_1 / L_i) L_i: gradients add up, one subnet's activations are alive
                if learns:
                    self.accelerator.backward(objective * share)
        return torch.stack(losses)

    def _load_balancing(self) -> Tensor | float:
        """Return SMOL's ``router_load_balancing`` term, once per micro-batch: () fp32, or 0."""
        term = getattr(self.model, "load_balancing_loss", None)
        if term is None:
            return 0.0
        value: Tensor = term()
        if value.requires_grad:
            self._means.add("load_balancing", value.detach())
        return value

    def _balanced(self, loss: Tensor, loss_largest: Tensor, shape: SubnetShape) -> Tensor:
        if not self.options.loss_balancing:
            return loss
        scaled, ratio = balance(loss, loss_largest, self.options.max_balance_ratio)
        self._means.add(f"balance/{shape}", ratio)
        return scaled

    def _logits(self, model: nn.Module, inputs: Mapping[str, Any], positions: Positions) -> Tensor:
        if self._keeps_logits:
            logits: Tensor = model(**inputs, logits_to_keep=positions.columns).logits
        else:
            logits = model(**inputs).logits[:, positions.columns]
        return logits.flatten(0, 1)

    def _teacher(self, logits: Tensor, positions: Positions) -> Tensor:
        """Keep the largest subnet's logits where they are distilled, in the dtype they were computed in."""
        kept = logits.detach() if len(positions.rows) == len(logits) else logits.detach()[positions.rows]
        # Under autocast accelerate hands out fp32 copies of half-precision outputs; nothing is lost on the way back.
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return kept if half is None else kept.to(half)

    def _synchronized(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between processes with the last subnet only, and only in the step's last micro-batch."""
        if last or not self.accelerator.sync_gradients:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def _share(self, num_targets: int, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """Return which part of the optimizer step's targets a micro-batch has: the weight of its mean losses."""
        if num_items_in_batch is None:
            return 1 / self.current_gradient_accumulation_steps
        # The step's loss is a mean over all its targets; where these are counted over processes, DDP's mean is undone.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return num_targets * processes / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def _next_micro_step(self) -> tuple[int, int]:
        step, seen = self._micro_step
        if step != self.state.global_step:
            step, seen = self.state.global_step, 0
        self._micro_step = (step, seen + 1)
        return step, seen

    def _require_finite(self, losses: Tensor, shapes: list[SubnetShape], step: int) -> None:
        if bool(losses.isfinite().all()):
            return
        if self.model is not None:
            self.model.zero_grad()
        index = int((~losses.isfinite()).nonzero()[0])
        raise TrainingError(
            f"the loss of subnet {shapes[index]} is {losses[index].item()} at step {step}; no parameter was changed by "
            "this step. Lower the learning rate, clip gradients (max_grad_norm), or do not train in fp16"
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the largest subnet, as Trainer does."""
        with self.elastic.active(self.elastic.space.largest):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding the subnets' means to what Trainer logs of the training."""
        if "loss" in logs or "train_loss" in logs:
            shapes, means = self._means.flush(self._mean_over_processes)
            logs.update(means)
            logs.update(self._routing(shapes))
        super().log(logs, start_time)

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(values, "mean") if self.accelerator.num_processes > 1 else values
        return reduced

    def _routing(self, shapes: list[str]) -> dict[str, float]:
        routing = getattr(self.model, "routing", None)
        if routing is None:
            return {}
        weights: dict[str, float] = {}
        for shape in shapes:
            with self.elastic.active(shape):
                values = routing().tolist()  # (experts,)
            weights |= {f"router/{shape}/expert_{index}": value for index, value in enumerate(values)}
        return weights


class _Means:
    """Running means by name, summed on the device: nothing waits for a number before it is logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, value: Tensor) -> None:
        """Add a ()-shaped value to the mean of that name."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] += 1

    def flush(self, reduce: Callable[[Tensor], Tensor]) -> tuple[list[str], dict[str, float]]:
        """Return the shapes seen and all means, and start again; ``reduce`` averages (names,) values over processes."""
        if not self._sums:
            return [], {}
        names = sorted(self._sums)
        values = reduce(torch.stack([self._sums[name] / self._counts[name] for name in names])).tolist()
        self._sums.clear()
        self._counts.clear()
        shapes = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
        return shapes, dict(zip(names, values, strict=True))


def _require_follows(model: nn.Module, elastic: ElasticModel) -> None:
    """Refuse a SMOL adapter whose router is not told the active shape: it would train at the largest only."""
    if not hasattr(model, "set_shape"):
        return
    with elastic.active(elastic.space.smallest):
        told = str(model.shape) == str(elastic.space.smallest)
    if not told:
        raise TrainingError(
            "the adapter does not follow the elastic model's shape; connect it with "
            "elastic.on_shape_change(lambda shape: peft_model.set_shape(shape, elastic.kept_layers(shape)))"
        )


def _require_supported(trainer: Trainer) -> None:
    if trainer.args.n_gpu > 1:
        raise TrainingError(
            "one process with several GPUs (DataParallel) is not supported; start one per GPU with torchrun"
        )
    if trainer.is_deepspeed_enabled:
        raise TrainingError("DeepSpeed is not supported; use DDP or FSDP2 through accelerate or torchrun")
    if trainer.args.label_smoothing_factor:
        raise TrainingError(
            "label_smoothing_factor is not supported: subnets learn from the teacher's distribution; set it to 0"
        )
