"""How the layers that a subnet keeps are written; attention and MLP are half a layer each. No torch.

A layer that keeps one of them is written as that, ``"2.mlp"``; a whole layer is its index, and a layer that has lost
both is not listed: it is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from amoeba_plugin.errors import ShapeError

PARTS = ("attention", "mlp")  # the words of transformers' per_layer_config["skip"] too; in the order they run
OTHER = dict(zip(PARTS, reversed(PARTS), strict=True))

Kept = int | str


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
