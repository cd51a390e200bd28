"""Gradients of the calibration loss with respect to weights, for first-order Taylor importances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch, target_counts
from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.errors import ArchitectureError, DataError
from amoeba_plugin.runtime.module_calls import evaluating, is_offloaded
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import sum_over_ranks
from amoeba_plugin.selection.objectives import target_losses


def loss_gradients(
    model: PreTrainedModel, weights: Mapping[str, nn.Parameter], batches: Sequence[Batch], progress: bool = True
) -> dict[str, Tensor]:
    """Return the gradients of the mean loss per target token over all batches, and over all ranks.

    However the tokens are cut into batches, the sum is what one pass over all of them would give. It is kept on the
    CPU in fp32, 4 bytes per weight; the accelerator holds one weight's gradient at a time, and the activations of one
    batch.

    Args:
        model: Left as it was, frozen and unfrozen parameters and their gradients included.
        weights: Parameters of the model, under any names.
        batches: From ``materialise``, with ``labels``; of each rank its own.
        progress: Show a progress bar.

    Returns:
        By the names given: fp32 on the CPU, nats per token and unit of weight.

    Raises:
        ArchitectureError: If accelerate offloads weights of the model: what it fetches for a call is another tensor,
            whose gradient is lost.
        DataError: If there is no target token, or a gradient is NaN or infinite; weight and batch are named.
    """
    if is_offloaded(model):
        raise ArchitectureError(
            "gradients of a model whose weights accelerate offloads: they are on no device while gradients are taken. "
            "Load the model without device_map and offloading where memory holds it whole, or take an importance or "
            "selector that needs no gradients (flap, wanda, magnitude; dynamic_program, block_influence)"
        )
    sums = {name: torch.zeros(weight.shape, dtype=torch.float32) for name, weight in weights.items()}
    number = -1

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                return
            if not bool(gradient.isfinite().all()):
                raise DataError(
                    f"the gradient of {name} is NaN or infinite on calibration batch {number}; load the model in "
                    "bfloat16 or float32 instead of float16, and look at that batch"
                )
            sums[name] += gradient.to("cpu", torch.float32)

        return hook

    tokens = torch.zeros((), dtype=torch.float64)
    with _only_trainable(model, weights.values()):
        handles = [weight.register_post_accumulate_grad_hook(collect(name)) for name, weight in weights.items()]
        try:
            for batch in StageBar(batches, desc="gradients", unit="batch", disable=not progress, shorter=LESS_DATA):
                number += 1
                tokens += int(target_counts(batch).sum())
                target_losses(model, batch).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
    count = int(sum_over_ranks(tokens))
    if not count:
        raise DataError(
            "no token to compute gradients on: no position of the calibration data has a label to predict; "
            "give sequences of two tokens or more"
        )
    return {name: sum_over_ranks(gradient) / count for name, gradient in sums.items()}


@contextmanager
def _only_trainable(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let a block take gradients of these weights only, in evaluation mode; flags and gradients come back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights:
            weight.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
