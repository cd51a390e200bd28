"""What a linear says of itself that computes with a part of its channels: which rows, which columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from amoeba_plugin.models.slices import Rows, count, take

NOT_MERGED = (
    "so that no adapter of an elastic model can be merged into it; take extract(elastic, shape), or save_elastic and "
    "`amoeba extract`"
)


class PartialLinear(nn.Module):
    """A linear of which some rows and the first columns are active; mixed into its class.

    Attributes:
        active_rows: Blocks of rows; one for an ordinary linear, several for a fused one.
        active_in: Columns.
        compensation: (widths, out_features) or ``None``; the row ``compensation_row`` is added to the output: what the
            missing input channels contributed on average.
        repaired: Name of the buffer, (out_features, active_in), that takes the place of the weight's active columns, or
            ``None``.
        repairs_are_changes: Whether such a buffer is what is added to the active columns instead.
        keeps_packed: Whether its host keeps the weight packed, so that it computes the whole product.
    """

    keeps_packed: ClassVar[bool] = False

    in_features: int
    out_features: int
    active_rows: Rows
    active_in: int
    compensation: Tensor | None
    compensation_row: int | None
    repaired: str | None
    repairs_are_changes: bool

    @property
    def active_out(self) -> int:
        """How many outputs it computes at the active width."""
        return count(self.active_rows)

    def extra_repr(self) -> str:
        """Show the active size beside the whole one."""
        return f"{super().extra_repr()}, active={self.active_out}x{self.active_in}"

    def whole_weight(self) -> Tensor:
        """Return the shared weight, (out_features, in_features), detached, in the order of channels that others see.

        No copy, but of a packed one.
        """
        raise NotImplementedError

    def restore(self) -> None:
        """Turn it into the linear it was made from, of its whole size, in place."""
        raise NotImplementedError

    def _activate_all(self) -> None:
        self.active_rows, self.active_in = (slice(0, self.out_features),), self.in_features
        self.register_buffer("compensation", None, persistent=False)
        self.compensation_row = None
        self.repaired, self.repairs_are_changes = None, False

    @property
    def holds_repaired(self) -> bool:
        """Whether it has a repaired weight at any shape."""
        return bool(vars(self).get("_held_repaired"))

    def hold_repaired(self, name: str, weight: Tensor) -> None:
        """Keep a weight, (out_features, columns), that ``repaired`` may name; it goes where the linear goes."""
        self.register_buffer(name, weight, persistent=False)
        held: dict[str, None] = vars(self).setdefault("_held_repaired", {})
        held[name] = None

    def repaired_weight(self, shared: Callable[[], Tensor]) -> Tensor:
        """Return the weight that is computed with, (active_out, active_in), where ``repaired`` names one.

        Args:
            shared: Returns the whole weight, (out_features, in_features).
        """
        assert self.repaired is not None
        held = self._buffers[self.repaired]
        assert held is not None
        weight = shared()[:, : held.shape[1]] + held if self.repairs_are_changes else held
        return take(weight, self.active_rows)

    def _compensated(self, output: Tensor) -> Tensor:
        if self.compensation is None or self.compensation_row is None:
            return output
        return output + take(self.compensation[self.compensation_row], self.active_rows).to(output.dtype)

    def _forget(self, *buffers: str) -> None:
        for name in ("compensation", *vars(self).pop("_held_repaired", ()), *buffers):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        del self.active_rows, self.active_in, self.compensation_row, self.repaired, self.repairs_are_changes
