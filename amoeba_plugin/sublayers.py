"""Attention and MLP of a decoder layer, each half a layer of depth: how kept ones are written, and what stands in for
one that is gone.

A layer that keeps one of them is written as that, ``"2.mlp"``; a whole layer is its index, and a layer that has lost
both is not listed: it is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from amoeba_plugin.errors import ShapeError
from amoeba_plugin.modeling_per_layer import STAND_INS

PARTS = ("attention", "mlp")  # the words of transformers' per_layer_config["skip"] too; in the order they run
OTHER = dict(zip(PARTS, reversed(PARTS), strict=True))

Kept = int | str


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


def read_kept(kept: Iterable[Kept]) -> tuple[tuple[int, ...], dict[int, str]]:
    """Return the layers of which anything is kept, ascending, and which sublayer those that are not whole have lost.

    >>> read_kept([0, "2.mlp", 3])
    ((0, 2, 3), {2: 'attention'})

    Raises:
        ShapeError: If an entry is no layer and no sublayer, or a layer is listed twice.
    """
    lost: dict[int, str | None] = {}
    for entry in kept:
        index, point, part = str(entry).partition(".")
        if not index.isdecimal() or (point and part not in PARTS) or int(index) in lost:
            raise ShapeError(
                f"'{entry}' among the layers kept: list each layer once, by its index, 2, or one of its sublayers, "
                "2.attention or 2.mlp"
            )
        lost[int(index)] = OTHER[part] if point else None
    return tuple(sorted(lost)), {layer: part for layer, part in sorted(lost.items()) if part is not None}


def write_kept(layers: Iterable[int], lost: Mapping[int, str]) -> list[Kept]:
    """Return what :func:`read_kept` reads.

    >>> write_kept([0, 2, 3], {2: "attention"})
    [0, '2.mlp', 3]
    """
    return [f"{layer}.{OTHER[lost[layer]]}" if layer in lost else layer for layer in layers]


def kept_without(num_layers: int, removed: Iterable[int], sublayers: bool) -> tuple[tuple[int, ...], dict[int, str]]:
    """Return layers and losses, as :func:`read_kept` does, of a model from which something is removed.

    Args:
        num_layers: Of the whole model.
        removed: Layers; or sublayers: 2 * layer is a layer's attention, 2 * layer + 1 its MLP.
        sublayers: Which of the two.

    >>> kept_without(3, {0, 2, 3}, sublayers=True)
    ((0, 2), {0: 'attention'})
    """
    gone = set(removed)
    if not sublayers:
        return tuple(layer for layer in range(num_layers) if layer not in gone), {}
    layers = [layer for layer in range(num_layers) if not {2 * layer, 2 * layer + 1} <= gone]
    return tuple(layers), {
        layer: part for layer in layers for number, part in enumerate(PARTS) if 2 * layer + number in gone
    }


def removed_names(removed: Iterable[int], sublayers: bool) -> list[str]:
    """Return the names of what is removed, for people.

    >>> removed_names({3, 0}, sublayers=False), removed_names({3, 0}, sublayers=True)
    (['layer 0', 'layer 3'], ['0.attention', '1.mlp'])
    """
    if not sublayers:
        return [f"layer {layer}" for layer in sorted(removed)]
    return [f"{index // 2}.{PARTS[index % 2]}" for index in sorted(removed)]


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
                self.layers[layer].set_submodule(path, stand_in)

    def restore(self) -> None:
        """Put every sublayer back."""
        while self._out:
            layer, path, module = self._out.pop()
            if module.training != layer.training:  # the mode changed while it was out
                module.train(layer.training)
            layer.set_submodule(path, module)

    @contextmanager
    def without(self, lost: Mapping[int, str]) -> Iterator[None]:
        """Take sublayers out for a block of code; all are back afterwards."""
        try:
            self.set(lost)
            yield
        finally:
            self.restore()
