"""The states that flow through decoder layers, watched from outside while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch, model_inputs
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.finite import not_finite
from amoeba_plugin.runtime.module_calls import evaluating, input_device


def states_into(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the states that a decoder layer is called with, (batch, positions, hidden): first, or by their name."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def states_out_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the states that a decoder layer answers with, alone or as the first of several values."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def watched(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect a decoder layer's input and output states, (batch, positions, hidden), of every call in a block."""
    flow: list[tuple[Tensor, Tensor]] = []

    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        flow.append((states_into(args, kwargs), states_out_of(output)))

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield flow
    finally:
        handle.remove()


def layer_flow(model: PreTrainedModel, adapter: ArchitectureAdapter, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return every decoder layer's input and output states on a batch, (batch, positions, hidden) each."""
    with ExitStack() as stack:
        flows = [stack.enter_context(watched(layer)) for layer in adapter.layers(model)]
        adapter.decoder(model)(**model_inputs(batch, input_device(model)), use_cache=False)
    return [flow[0] for flow in flows]


def where_not_finite(model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch]) -> str:
    """Say, for an error message, which weight is NaN or infinite, or on which batch and behind which layer states first
    are; else ""."""
    weight = not_finite(model)
    if weight is not None:
        return f" ({weight} is NaN or infinite somewhere)"
    with evaluating(model):
        for number, batch in enumerate(batches):
            present = batch["attention_mask"].bool()
            for index, (states, output) in enumerate(layer_flow(model, adapter, batch)):
                for name, tensor in ((f"into layer {index}", states), (f"out of layer {index}", output)):
                    if not bool(tensor[present.to(tensor.device)].isfinite().all()):
                        return f" (on calibration batch {number} the states that come {name} are NaN or infinite)"
    return ""
