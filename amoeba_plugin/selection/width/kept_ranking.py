"""What a ranking of widths found, as a step that a selection keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.selection.kept_steps import KeptSteps, Step
from amoeba_plugin.shape import SubnetShape, parse_width

ORDER, MEAN_INPUT = "order.", "mean_input."


@dataclass(frozen=True)
class Ranking:
    """What a ranking found.

    Attributes:
        width: The strategy.
        totals: Of every share of the whole model that was asked for, its best shape.
        anchors: Indices of the layers that keep full width.
        repair: By its name; ``none`` where the model allows none.
    """

    width: WidthStrategy
    totals: Mapping[Fraction, SubnetShape] = field(default_factory=dict)
    anchors: tuple[int, ...] = ()
    repair: str = "none"


def kept_ranking(kept: KeptSteps, rank: Callable[[], Ranking]) -> Ranking:
    """Return a ranking, computed where it is not there; errors are those of :meth:`KeptSteps.step`."""
    return _read(kept.step("ranking", lambda: _step(rank())))


def _step(found: Ranking) -> Step:
    width = found.width
    tensors = {f"{ORDER}{key}": each.clone() for key, each in width.order.items()}
    tensors |= {f"{MEAN_INPUT}{key}": each.clone() for key, each in width.mean_input.items()}
    values = {
        "units": {str(share): dict(units) for share, units in width.units.items()},
        "importance": width.importance,
        "allocation": width.allocation,
        "bias_compensation": width.bias_compensation,
        "totals": {str(total): str(shape) for total, shape in found.totals.items()},
        "anchors": list(found.anchors),
        "repair": found.repair,
    }
    return Step(tensors, values)


def _read(step: Step) -> Ranking:
    order, means = (
        {key.removeprefix(prefix): each for key, each in step.tensors.items() if key.startswith(prefix)}
        for prefix in (ORDER, MEAN_INPUT)
    )
    told = step.values
    units = {parse_width(share): units for share, units in told["units"].items()}
    return Ranking(
        WidthStrategy(units, order, means, told["importance"], told["allocation"], told["bias_compensation"]),
        {parse_width(total): SubnetShape.parse(shape) for total, shape in told["totals"].items()},
        tuple(told["anchors"]),
        told["repair"],
    )
