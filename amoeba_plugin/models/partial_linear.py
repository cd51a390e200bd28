"""What a linear says of itself that computes with a part of its channels: which rows, which columns."""

from __future__ import annotations

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
        keeps_packed: Whether its host keeps the weight packed, so that it computes the whole product.
    """

    keeps_packed: ClassVar[bool] = False

    in_features: int
    out_features: int
    active_rows: Rows
    active_in: int
    compensation: Tensor | None
    compensation_row: int | None

    @property
    def active_out(self) -> int:
        """How many outputs it computes at the active width."""
        return count(self.active_rows)

    def extra_repr(self) -> str:
        """Show the active size beside the whole one."""
        return f"{super().extra_repr()}, active={self.active_out}x{self.active_in}"

    def restore(self) -> None:
        """Turn it into the linear it was made from, of its whole size, in place."""
        raise NotImplementedError

    def _activate_all(self) -> None:
        self.active_rows, self.active_in = (slice(0, self.out_features),), self.in_features
        self.register_buffer("compensation", None, persistent=False)
        self.compensation_row = None

    def _compensated(self, output: Tensor) -> Tensor:
        if self.compensation is None or self.compensation_row is None:
            return output
        return output + take(self.compensation[self.compensation_row], self.active_rows).to(output.dtype)

    def _forget(self, *buffers: str) -> None:
        for name in ("compensation", *buffers):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        del self.active_rows, self.active_in, self.compensation_row
