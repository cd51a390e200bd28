"""Attention and MLP of a decoder layer, each half a layer of depth: what stands in for one that is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from amoeba_plugin.models.modeling_per_layer import STAND_INS


@dataclass(frozen=True)
class Sublayer:
    """Attention or MLP of an architecture's decoder layer: what goes with it.

    Attributes:
        stand_ins: By path in the decoder layer what takes a module's place, a key of ``STAND_INS``. Norms that nothing
            but the sublayer uses go too; one over the residual stream stays.
        outputs: Names of the parameters whose zeros make it add nothing; those that a model lacks are passed over.
    """

    stand_ins: Mapping[str, str]
    outputs: tuple[str, ...]


@dataclass
class StandIns:
    """Takes sublayers out of live decoder layers, by exchanging modules, and puts them back. Nothing is copied.

    Attributes:
        sublayers: Of the architecture, by name.
        layers: All decoder layers of the whole model.
    """

    sublayers: Mapping[str, Sublayer]
    layers: Sequence[nn.Module]
    _out: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def set(self, lost: Mapping[int, str]) -> None:
        """Take out what some layers have lost, and put back all else."""
        self.restore()
        for layer, part in lost.items():
            for path, kind in self.sublayers[part].stand_ins.items():
                self._out.append((self.layers[layer], path, self.layers[layer].get_submodule(path)))
                stand_in = STAND_INS[kind](layer)
                stand_in.train(self.layers[layer].training)
                _exchange(self.layers[layer], path, stand_in)

    def restore(self) -> None:
        """Put every sublayer back."""
        while self._out:
            layer, path, module = self._out.pop()
            if module.training != layer.training:  # the mode changed while it was out
                module.train(layer.training)
            _exchange(layer, path, module)

    @contextmanager
    def without(self, lost: Mapping[int, str]) -> Iterator[None]:
        """Take sublayers out for a block of code; all are back afterwards."""
        try:
            self.set(lost)
            yield
        finally:
            self.restore()


def _exchange(layer: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another, with the index in the cache that this one had."""
    numbers = [vars(each)["layer_idx"] for each in layer.get_submodule(path).modules() if "layer_idx" in vars(each)]
    for each in module.modules():
        if numbers and "layer_idx" in vars(each):
            vars(each)["layer_idx"] = numbers[0]
    layer.set_submodule(path, module)
