"""A unit's weights as they would be: zeros where Wanda puts them, then rounded to the nearest; for measuring alone.

Rounding is compressed-tensors' own, so that it is what llm-compressor's ``QuantizationModifier`` stores. GPTQ and
SparseGPT lose less, and rank units much the same; measuring with them would run them for every option.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch, model_inputs
from amoeba_plugin.data.sharing import shard
from amoeba_plugin.runtime.module_calls import evaluating, input_device
from amoeba_plugin.runtime.ranks import sum_over_ranks
from amoeba_plugin.selection.layerwise.options import WHOLE, Grid, Option, pruned_columns
from amoeba_plugin.selection.layerwise.units import Unit


def rounded(weight: Tensor, bits: int, grid: Grid) -> Tensor:
    """Return a weight, (out, in), with every value on its grid, in its own dtype."""
    if bits == WHOLE:
        return weight
    size = grid.group_size if grid.group_size > 0 else weight.shape[1]
    groups, arguments = weight.unflatten(-1, (-1, size)), grid.arguments(bits)
    scale, zero_point = calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), arguments)
    found: Tensor = fake_quantize(weight, scale, zero_point, arguments)
    return found


def pruned(weight: Tensor, sparsity: float, norms: Tensor) -> Tensor:
    """Return a weight, (out, in), whose least values of |weight| x norm of the input are zero in every row (Wanda).

    Args:
        weight: Left as it is.
        sparsity: Share of every row, rounded down to whole weights.
        norms: Of the inputs, (in,).
    """
    count = pruned_columns(weight.shape[1], sparsity)
    if not count:
        return weight
    least = torch.sort(weight.float().abs() * norms.to(weight.device), dim=-1, stable=True).indices[:, :count]
    return weight.scatter(1, least, 0)


def compressed(linear: nn.Linear, option: Option, grid: Grid, norms: Tensor | None) -> Tensor:
    """Return the weight of a linear at an option; the linear is left as it is.

    Args:
        linear: In full precision.
        option: Bits and sparsity.
        grid: To round to.
        norms: Of its inputs, (in,); not needed without zeros.
    """
    weight = linear.weight.detach()
    if option.sparsity:
        assert norms is not None
        weight = pruned(weight, option.sparsity, norms)
    return rounded(weight, option.bits, grid)


@contextmanager
def exchanged(weights: Sequence[tuple[nn.Linear, Tensor]]) -> Iterator[None]:
    """Let linears have other weights in a block of code."""
    before = [(linear, linear.weight.data) for linear, _ in weights]
    try:
        for linear, weight in weights:
            linear.weight.data = weight
        yield
    finally:
        for linear, weight in before:
            linear.weight.data = weight


@dataclass
class Compressor:
    """Makes the weights of units at options.

    Attributes:
        model: In full precision.
        grid: To round to.
        norms: Of the inputs of units, by name; empty where nothing is made zero.
    """

    model: PreTrainedModel
    grid: Grid
    norms: Mapping[str, Tensor] = field(default_factory=dict)

    def weights(self, unit: Unit, option: Option) -> list[tuple[nn.Linear, Tensor]]:
        """Return the linears of a unit with their weights at an option."""
        norms = self.norms.get(unit.name)
        return [(linear, compressed(linear, option, self.grid, norms)) for linear in unit.linears(self.model)]

    @contextmanager
    def at(self, choice: Mapping[Unit, Option]) -> Iterator[None]:
        """Let all units be at the options chosen in a block of code."""
        changed = [(unit, option) for unit, option in choice.items() if option != Option()]
        with exchanged([pair for unit, option in changed for pair in self.weights(unit, option)]):
            yield


def input_norms(model: PreTrainedModel, units: Sequence[Unit], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the norms of the inputs of every unit over all real tokens of all ranks, (in,) fp32 each, by name.

    All linears of a unit read the same.
    """
    sums = {unit.name: torch.zeros(unit.columns, dtype=torch.float64) for unit in units}
    present = torch.empty(0)

    def note(name: str, inputs: Tensor) -> None:
        tokens = inputs.flatten(0, -2)[present.to(inputs.device)]
        sums[name] += tokens.float().square().sum(dim=0).cpu().double()

    handles = [
        unit.linears(model)[0].register_forward_pre_hook(lambda module, args, name=unit.name: note(name, args[0]))
        for unit in units
    ]
    try:
        with evaluating(model):
            for batch in shard(batches)[0]:
                present = batch["attention_mask"].bool().flatten()
                model(**model_inputs(batch, input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sum_over_ranks(total).sqrt().float() for name, total in sums.items()}
