"""One worker computes for many requests, a step at a time: which step is next, and when every token will be there.

A step is a prompt, or one token of an answer. The next one is that with the earliest deadline (earliest deadline first,
Liu and Layland 1973), and no step is interrupted. Requests that named no target come when nothing else waits, in the
order they came.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from amoeba_plugin.serving.slo import Latency, Limits


@dataclass(frozen=True)
class Job:
    """A request that was taken: its targets, what its steps take, how far it is.

    Attributes:
        number: Ascending in the order in which requests came.
        came: When, in seconds of any clock.
        limits: Its targets; a total is kept as a deadline of its last token.
        latency: What its steps take.
        answer: Tokens of the answer, at most.
        first: When its first token was there; ``None``: it was not yet.
        done: Tokens that are there.
    """

    number: int
    came: float
    limits: Limits
    latency: Latency
    answer: int
    first: float | None = None
    done: int = 0

    @property
    def left(self) -> int:
        """Steps that are left."""
        return self.answer - self.done

    @property
    def next_takes(self) -> float:
        """Seconds of the next step."""
        return self.latency.tpot if self.done else self.latency.ttft

    @property
    def rest(self) -> float:
        """Seconds of all steps that are left."""
        return self.next_takes + (self.left - 1) * self.latency.tpot if self.left else 0.0

    @property
    def deadline(self) -> float:
        """When the next token must be there; of a total what leaves the others time."""
        last = self.came + self.limits.total - (self.left - 1) * self.latency.tpot
        if self.first is None:
            return min(self.came + self.limits.ttft, last)
        return min(self.first + self.done * self.limits.tpot, last)

    @property
    def urgency(self) -> tuple[float, float, int]:
        """What orders steps: the deadline, and of equal ones what came first."""
        return self.deadline, self.came, self.number

    def stepped(self, now: float) -> Job:
        """Return it with one more token, which is there now."""
        return replace(self, first=now if self.first is None else self.first, done=self.done + 1)

    def keeps(self, last: float) -> bool:
        """Tell whether all targets are kept where all tokens are there, the last one at some time."""
        assert self.first is not None
        mean = (last - self.first) / (self.answer - 1) if self.answer > 1 else 0.0
        return (
            _within(self.first - self.came, self.limits.ttft)
            and _within(mean, self.limits.tpot)
            and _within(last - self.came, self.limits.total)
        )


@dataclass(frozen=True)
class Promise:
    """What a request will get, if steps take what was predicted.

    Attributes:
        latency: From when it came to its first token, and the mean between tokens.
        kept: Whether that keeps its targets.
    """

    latency: Latency
    kept: bool


def most_urgent(jobs: Sequence[Job]) -> Job:
    """Return the job whose next step is computed next."""
    return min(jobs, key=lambda job: job.urgency)


def promises(jobs: Sequence[Job], now: float) -> Mapping[int, Promise]:
    """Return what every job will get, by number: all steps are played through.

    Args:
        jobs: That are not done, each with one token to come at least.
        now: When the next step begins.
    """
    found = {}
    waiting = [(job.urgency, job) for job in jobs]  # no two are equal: numbers differ
    heapq.heapify(waiting)
    while waiting:
        _, job = waiting[0]
        now += job.next_takes
        job = job.stepped(now)
        if job.left:
            heapq.heapreplace(waiting, (job.urgency, job))
            continue
        heapq.heappop(waiting)
        assert job.first is not None
        mean = (now - job.first) / (job.answer - 1) if job.answer > 1 else 0.0
        found[job.number] = Promise(Latency(job.first - job.came, mean), job.keeps(now))
    return found


def admits(before: Mapping[int, Promise], behind: Mapping[int, Promise], new: int) -> bool:
    """Tell whether a new job keeps its targets beside the others, and takes none of theirs from those that keep them.

    Args:
        before: What those get that were taken before, by :func:`promises`.
        behind: What they get with the new one among them.
        new: Its number.
    """
    return behind[new].kept and all(behind[number].kept for number, each in before.items() if each.kept)


def _within(took: float, limit: float) -> bool:
    return took <= limit or math.isclose(took, limit, rel_tol=1e-9)
