"""Progress bars of stages that may take hours: each says once, early, how long that will be and what shortens it."""

from __future__ import annotations

import logging
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)
EARLY = 5.0  # seconds after which a pace can be told
LONG = 60.0  # seconds that are worth a line


class StageBar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
    """A tqdm bar with a line of its own for stages that turn out long.

    Args:
        shorter: What shortens the stage, for people: "fewer --num-calibration-samples".
    """

    def __init__(self, *args: Any, shorter: str, **kwargs: Any) -> None:
        self._shorter, self._told = shorter, False
        super().__init__(*args, **kwargs)

    def update(self, n: float | None = 1) -> bool | None:
        """Move on by so many."""
        shown: bool | None = super().update(n)
        if not (self._told or self.disable):
            about = self.format_dict
            self._told = tell_pace(self.desc, about["n"], about["total"], about["elapsed"], self._shorter)
        return shown


def tell_pace(stage: str, done: float, total: float | None, elapsed: float, shorter: str) -> bool:
    """Log how long the rest of a stage will take, if that is long; return whether its pace can be told by now.

    >>> tell_pace("search", 1, 100, 1.0, "less data"), tell_pace("search", 50, 100, 6.0, "less data")
    (False, True)
    """
    if not done or not total or elapsed < EARLY:
        return False
    left = elapsed * (total - done) / done
    if left > LONG:
        logger.info("%s: about %s at this pace; %s would shorten it", stage, in_words(left), shorter)
    return True


def in_words(seconds: float) -> str:
    """Return a duration for people.

    >>> in_words(50), in_words(600), in_words(54000), in_words(1e6)
    ('50 s', '10 min', '15 h', '12 days')
    """
    for limit, unit, name in ((100, 1, "s"), (100 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} days"
