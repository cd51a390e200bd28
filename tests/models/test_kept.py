"""How layers kept in part are written and read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.errors import ShapeError
from amoeba_plugin.models.kept import PARTS, Kept, kept_without, read_kept, write_kept


@given(st.data(), st.integers(1, 6))
def test_what_is_kept_is_read_back(data: st.DataObject, layers: int) -> None:
    removed = data.draw(st.sets(st.integers(0, 2 * layers - 1)))
    kept, lost = kept_without(layers, removed, sublayers=True)
    assert read_kept(write_kept(kept, lost)) == (kept, lost)
    assert len(kept) - len(lost) / 2 == layers - len(removed) / 2
    there = {2 * layer + PARTS.index(part) for layer in kept for part in PARTS if lost.get(layer) != part}
    assert there == set(range(2 * layers)) - removed


@pytest.mark.parametrize("entry", ["2.norm", "mlp", "-1", "1.5", "", "2.mlp.0", 1])
def test_what_is_no_layer_is_refused(entry: Kept) -> None:
    with pytest.raises(ShapeError, match=r"2\.attention or 2\.mlp"):
        read_kept([1, entry])
