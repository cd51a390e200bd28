"""Active parts of parameters: row blocks of a linear, and modules whose ``forward`` shall see slices of parameters.

Nothing here knows of models; :mod:`amoeba_plugin.elastic.model` says what is active.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Rows = tuple[slice, ...]  # disjoint, ascending, each with start and stop


def joined(blocks: Iterable[slice]) -> Rows:
    """Return blocks in ascending order, those that touch made one, so that a whole tensor is one block.

    >>> joined([slice(4, 6), slice(0, 4), slice(8, 9)])
    (slice(0, 6, None), slice(8, 9, None))
    """
    rows: list[slice] = []
    for block in sorted(blocks, key=lambda each: each.start):
        if rows and rows[-1].stop == block.start:
            rows[-1] = slice(rows[-1].start, block.stop)
        else:
            rows.append(block)
    return tuple(rows)


def take(tensor: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """Return the blocks of a tensor along one axis: a view if there is one block, else a copy."""
    views = [tensor.narrow(dim, block.start, block.stop - block.start) for block in rows]
    return views[0] if len(views) == 1 else torch.cat(views, dim)


def count(rows: Rows) -> int:
    """Return how many rows the blocks hold."""
    return sum(block.stop - block.start for block in rows)


class SlicedModule:
    """What :func:`slice_parameters` mixes into a module's class; the parameters stay the same objects.

    Attributes:
        active: Per parameter the axis and the blocks that ``forward`` sees; others are seen whole.
        replaced: Per parameter the buffer that is seen in place of what is active of it.
        replacements_are_changes: Whether such a buffer is what is added to the active part instead.
    """

    active: dict[str, tuple[int, Rows]]
    replaced: dict[str, str]
    replacements_are_changes: bool
    _seen: dict[str, Tensor]

    def active_part(self, name: str) -> Tensor:
        """Return what ``forward`` sees of a parameter that is in ``active``; a view where possible."""
        module: Any = self
        dim, rows = self.active[name]
        if name not in self.replaced:
            return take(module._parameters[name], rows, dim)
        whole = module._parameters[name]
        held: Tensor = module._buffers[self.replaced[name]].to(whole.dtype)  # FSDP casts parameters, and no buffers
        return take(whole, rows, dim) + held if self.replacements_are_changes else held


def slice_parameters(module: nn.Module) -> None:
    """Let a module's own ``forward`` see, where it reads a parameter, the active slice of it; in place.

    Slices are taken once per forward, and outside of it every parameter is whole.
    """
    names = tuple(name for name, parameter in module._parameters.items() if parameter is not None)
    vars(module).update(active={}, replaced={}, replacements_are_changes=False, _seen={})
    module.__class__ = _sliced_class(type(module), names)  # type: ignore[arg-type]  # its metaclass is hashable


def restore_parameters(module: nn.Module) -> None:
    """Undo :func:`slice_parameters`."""
    assert isinstance(module, SlicedModule)
    for name in ("active", "replaced", "replacements_are_changes", "_seen"):
        del vars(module)[name]
    module.__class__ = type(module).__mro__[2]


def active_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """Return a module's own parameters at their active sizes, detached; views where possible."""
    whole = {name: each.detach() for name, each in module._parameters.items() if each is not None}
    active = module.active if isinstance(module, SlicedModule) else {}
    return whole | {name: _widened(module, name).detach() for name in active}


def _widened(module: Any, name: str) -> Tensor:
    """Return the active part; what replaces a narrower one is followed by zeros."""
    part: Tensor = module.active_part(name)
    dim, rows = module.active[name]
    missing = count(rows) - part.shape[dim]
    return (
        torch.cat([part, part.new_zeros(*part.shape[:dim], missing, *part.shape[dim + 1 :])], dim) if missing else part
    )


@cache
def _sliced_class(whole: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._seen.update({name: self.active_part(name) for name in self.active})
        try:
            return whole.forward(self, *args, **kwargs)
        finally:
            self._seen.clear()

    def seen(name: str) -> property:
        return property(lambda self: self._seen.get(name, self._parameters[name]))

    # A property of the class comes before nn.Module.__getattr__, which is where parameters are found otherwise.
    members = {name: seen(name) for name in names} | {"forward": forward}
    return type(f"Sliced{whole.__name__}", (SlicedModule, whole), members)
