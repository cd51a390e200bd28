"""The units that a policy decides on: the linears of a decoder layer that engines keep in one matrix.

Engines fuse q, k and v, and gate and up, and refuse to load a fused matrix whose parts have different schemes; so these
are decided together. They read the same input, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup
from amoeba_plugin.models.packed_linear import is_packed

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Unit:
    """Linears that get the same bits and the same sparsity.

    Attributes:
        name: The layer and the linears: "3.q_proj+k_proj+v_proj".
        layer: Index of the decoder layer.
        modules: Their paths in the model, in its order.
        rows: Outputs of all of them.
        columns: Inputs of each.
    """

    name: str
    layer: int
    modules: tuple[str, ...]
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.rows * self.columns

    def linears(self, model: nn.Module) -> list[nn.Linear]:
        """Return its linears."""
        return [module for path in self.modules if isinstance(module := model.get_submodule(path), nn.Linear)]


def layer_units(model: PreTrainedModel, adapter: ArchitectureAdapter) -> list[Unit]:
    """Return the units of all decoder layers, in the model's order.

    Args:
        model: Needs no weights: it may be on "meta".
        adapter: Its architecture.

    Raises:
        ArchitectureError: If the model is a mixture of experts, or its linears are packed.
    """
    groups = adapter.channel_groups(model.config)
    if any(group.consumer.expert is not None for group in groups):
        raise ArchitectureError(
            f"a layer-wise policy of a {model.config.model_type}: of a quantized mixture of experts transformers reads "
            "back one scheme for all layers alone, so that there is nothing to choose; quantize it in one scheme, "
            "W4A16 or W8A16"
        )
    paths = {module: path for path, module in model.named_modules()}
    order = {path: place for place, path in enumerate(paths.values())}
    units = [
        _unit(index, sorted((paths[layer.get_submodule(path)] for path in together), key=order.__getitem__), model)
        for index, layer in enumerate(adapter.layers(model))
        for together in _fused(groups, layer)
    ]
    return sorted(units, key=lambda unit: order[unit.modules[0]])


def modules_in_order(units: Sequence[Unit], model: nn.Module) -> list[str]:
    """Return the paths of all linears of units in the order in which the model has them."""
    held = {path for unit in units for path in unit.modules}
    return [path for path, _ in model.named_modules() if path in held]


def _fused(groups: Sequence[ChannelGroup], layer: nn.Module) -> Iterator[list[str]]:
    """Yield the paths within a layer of what goes together; projections that a decoder fuses itself are one path.

    Of attention whose channels an adapter does not name (OPT, GPT-NeoX), q, k and v go together, and all else alone.
    """
    held = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear) or is_packed(module)}
    for group in groups:
        for together in (list(dict.fromkeys(axis.path for axis in group.producers)), [group.consumer.path]):
            yield together
            held -= set(together)
    rest = sorted(held)
    qkv = [path for path in rest if path.rpartition(".")[2] in QKV]
    if qkv:
        yield qkv
    yield from ([path] for path in rest if path not in qkv)


def _unit(layer: int, paths: list[str], model: nn.Module) -> Unit:
    linears = []
    for path in paths:
        module = model.get_submodule(path)
        if is_packed(module) or not isinstance(module, nn.Linear):
            raise ArchitectureError(
                f"a layer-wise policy chooses the bits of full-precision linears, and {path} is packed or no linear; "
                "give the original model"
            )
        linears.append(module)
    name = f"{layer}.{'+'.join(path.rpartition('.')[2] for path in paths)}"
    return Unit(name, layer, tuple(paths), sum(each.out_features for each in linears), linears[0].in_features)
