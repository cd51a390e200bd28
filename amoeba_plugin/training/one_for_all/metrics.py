"""What is logged of every subnet: running means on the device, the router's mixture, the conflict of gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.shape import SubnetShape


class SubnetMeans:
    """Running means by name, summed on the device: nothing waits for a number before it is logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, value: Tensor) -> None:
        """Add a ()-shaped value to the mean of that name."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] += 1

    def flush(self) -> tuple[list[str], dict[str, float]]:
        """Return the shapes seen and all means, and start again."""
        if not self._sums:
            return [], {}
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] / self._counts[name] for name in names]).tolist()
        self._sums.clear()
        self._counts.clear()
        shapes = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
        return shapes, dict(zip(names, values, strict=True))


class GradientConflict:
    """Takes apart the gradients that the subnets of one micro-batch add up, and compares them.

    >>> conflict = GradientConflict([parameter])  # doctest: +SKIP
    >>> conflict.after(elastic.space.largest), conflict.after(elastic.space.smallest)  # doctest: +SKIP
    >>> dict(conflict.cosines())  # doctest: +SKIP
    {'12x1~8x3/4': tensor(0.41)}
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._before = self._gradient()
        self._gradients: list[tuple[SubnetShape, Tensor]] = []

    def after(self, shape: SubnetShape) -> None:
        """Note what a subnet's backward, just done, added to the gradients."""
        gradient = self._gradient()
        self._gradients.append((shape, gradient - self._before))
        self._before = gradient

    def cosines(self) -> Iterator[tuple[str, Tensor]]:
        """Return the cosine of every pair of subnets, () each, as "LARGER~SMALLER"; 0 where one has no gradient.

        Where a shape was drawn twice, its pairs come twice, to be averaged; it makes no pair with itself.
        """
        ordered = sorted(self._gradients, key=lambda each: each[0], reverse=True)
        for (first, one), (second, other) in combinations(ordered, 2):
            if first != second:
                yield f"{first}~{second}", functional.cosine_similarity(one, other, dim=0)

    def _gradient(self) -> Tensor:
        return torch.cat(
            [
                (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten().float()
                for parameter in self._parameters
            ]
        )


def routing_log(routing: Callable[[], Tensor], elastic: ElasticModel, shapes: Iterable[str]) -> dict[str, float]:
    """Return each shape's mixture of experts as it is now, without noise, and its entropy in nats."""
    entries: dict[str, float] = {}
    for shape in shapes:
        with elastic.active(shape):
            weights = routing()  # (experts,)
        entries |= {f"router/{shape}/expert_{index}": value for index, value in enumerate(weights.tolist())}
        entries[f"router/{shape}/entropy"] = float(torch.special.entr(weights).sum())
    return entries
