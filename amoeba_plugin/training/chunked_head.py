"""A subnet's loss, taken where its output head stands, a chunk of positions at a time.

A model's logits are its largest activation, and a loss needs them, their softmax and their gradient. Here each chunk of
positions goes from hidden states to logits, loss and the gradient of the hidden states before the next one does (plain
torch; the idea is that of fused linear cross-entropy, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from transformers import PreTrainedModel

from amoeba_plugin.training.next_token import RowLoss, chunk_rows, kept_scale


class ChunkedHead(nn.Module):
    """Stands in for a linear head and returns the loss instead of the logits.

    Args:
        head: The head it stands in for; its parameters get their gradients.
        rows: (N,) int64, the positions that count, as indices into the flattened hidden states.
        row_loss: Maps fp32 logits (n, vocabulary) and the slice of ``rows`` they stand for to (n,) losses.
    """

    def __init__(self, head: nn.Linear, rows: Tensor, row_loss: RowLoss) -> None:
        super().__init__()
        self._head = (head,)  # in a tuple, so that it is not registered a second time
        self.rows, self.row_loss = rows, row_loss

    @property
    def weight(self) -> Tensor:
        """The head's own: hosts look for it to tie embeddings."""
        return self._head[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., hidden size) to the sum of the rows' losses, () fp32."""
        head = self._head[0]
        total: Tensor = _LossOfHead.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, -2), head.weight, head.bias, self.rows, self.row_loss
        )
        return total


@contextmanager
def chunked_head(model: PreTrainedModel, rows: Tensor, row_loss: RowLoss) -> Iterator[None]:
    """Let the model's forward return the loss as its ``logits``; the head comes back at the end.

    Args:
        model: One that :func:`has_plain_head` accepts.
        rows: (N,) int64, indices into the (batch * positions) hidden states that reach the head.
        row_loss: As in :class:`ChunkedHead`.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    if isinstance(head, FSDPModule):
        head.unshard()  # its own forward, which would gather its weight, does not run; the backward frees it
    model.set_output_embeddings(ChunkedHead(head, rows, row_loss))
    try:
        yield
    finally:
        model.set_output_embeddings(head)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Tell whether ``logits`` are what a linear head returns, and nothing comes after it, by a forward of two tokens.

    Gemma caps its logits and Granite scales them: such models need their logits as a whole. So does a head that carries
    an adapter, is quantized, or is called through hooks.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        return False
    if "logits_to_keep" not in signature(model.forward).parameters:
        return False
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    modes = [(module, module.training) for module in model.modules()]
    try:
        logits = model.eval()(torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device), use_cache=False).logits
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    return len(outputs) == 1 and logits is outputs[0]


class _LossOfHead(torch.autograd.Function):
    """Sum of the rows' losses; the gradients are computed together with it. Can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, row_loss: RowLoss
    ) -> Tensor:
        half = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        dtype = half or weight.dtype
        ctx.scale = kept_scale(dtype)
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)  # cast once, not once per chunk
        needs = ctx.needs_input_grad[:3]
        gradients = [
            torch.zeros_like(value) if value is not None and needed else None
            for value, needed in zip((hidden, weight, bias), needs, strict=True)
        ]
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        kept = torch.full_like(total, ctx.scale)
        chunk = chunk_rows(weight.shape[0], hidden.device)
        for start in range(0, len(rows), chunk):
            place = slice(start, start + chunk)
            part = hidden[rows[place]].to(dtype)  # (n, hidden size)
            logits = functional.linear(part, head, offset).to(total.dtype).requires_grad_(any(needs))
            with torch.enable_grad():
                value = row_loss(logits, place).sum()
            total += value.detach()
            if any(needs):
                gradient = torch.autograd.grad(value, logits, kept)[0].to(dtype)
                _add(gradients, gradient, part, head, rows[place])
        ctx.gradients = gradients
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, hence only once
        if gradients is None:
            raise RuntimeError("chunked_head: a second backward through the same loss; compute the loss again")
        factor = grad_output / ctx.scale
        return (*(None if value is None else value.mul_(factor) for value in gradients), None, None)


def _add(gradients: list[Tensor | None], gradient: Tensor, part: Tensor, head: Tensor, rows: Tensor) -> None:
    """Add what one chunk's logits contribute to the gradients of hidden states, weight and bias."""
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[rows] = (gradient @ head).to(of_hidden.dtype)
    if of_weight is not None:
        if of_weight.dtype == gradient.dtype:
            of_weight.addmm_(gradient.T, part)
        else:
            of_weight += gradient.T @ part
    if of_bias is not None:
        of_bias += gradient.sum(dim=0)
