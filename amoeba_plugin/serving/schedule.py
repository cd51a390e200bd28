"""One worker computes for many requests, a step at a time: which step is next, and when every token will be there.

A step is a prompt, or one token of an answer. The next one is that with the earliest deadline (earliest deadline first,
Liu and Layland 1973), and no step is interrupted. Requests that named no target come when nothing else waits, so many
at once in turns, the others in the order they came. Tokens of several requests at one shape may be one step.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from amoeba_plugin.serving.slo import Latency, Limits, within


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
    def is_patient(self) -> bool:
        """Whether it named no target."""
        return self.limits == Limits()

    @property
    def urgency(self) -> tuple[float, bool, int, float, int]:
        """What orders steps: the deadline, of patient ones what has fewest tokens, of equal ones what came first."""
        return self.deadline, self.is_patient, self.done * self.is_patient, self.came, self.number

    def stepped(self, now: float) -> Job:
        """Return it with one more token, which is there now."""
        return replace(self, first=now if self.first is None else self.first, done=self.done + 1)

    def keeps(self, last: float) -> bool:
        """Tell whether all targets are kept where all tokens are there, the last one at some time."""
        assert self.first is not None
        mean = (last - self.first) / (self.answer - 1) if self.answer > 1 else 0.0
        return (
            within(self.first - self.came, self.limits.ttft)
            and within(mean, self.limits.tpot)
            and within(last - self.came, self.limits.total)
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


def begun_or_urgent(jobs: Sequence[Job], at_once: int = 1) -> tuple[list[Job], list[Job]]:
    """Return the jobs of which one has the next step, and those that have to wait until a patient one is done.

    Args:
        jobs: That are not done.
        at_once: Patient jobs that may be under way; their keys and values take memory.
    """
    later = sorted((job for job in jobs if job.is_patient and not job.done), key=lambda job: job.urgency)
    under_way = sum(job.is_patient and job.done > 0 for job in jobs)
    waiting = later[max(0, at_once - under_way) :]
    behind = {job.number for job in waiting}
    return [job for job in jobs if job.number not in behind], waiting


def most_urgent(jobs: Sequence[Job], at_once: int = 1) -> Job:
    """Return the job whose next step is computed next; ``at_once`` as of :func:`begun_or_urgent`."""
    return min(begun_or_urgent(jobs, at_once)[0], key=lambda job: job.urgency)


def computed_with(jobs: Sequence[Job], alike: Collection[int], now: float, most: int) -> list[Job]:
    """Return the jobs whose next tokens are one step: the most urgent one, and those that would follow it.

    The step is taken to last as long as theirs one after the other, which is more than it does. Behind it all is as it
    would be then, so that nobody loses what was promised; a last token that would be late is left to a step of its own.

    Args:
        jobs: That are not done.
        alike: Numbers of those at the shape of the most urgent one.
        now: When the step begins.
        most: Tokens of a step, and patient jobs that may be under way.
    """
    left = {job.number: job for job in jobs}
    chosen: list[tuple[Job, float]] = []  # with when each would be there, one after the other
    while left and len(chosen) < most:
        job = most_urgent(list(left.values()), most)
        now += job.next_takes
        chosen.append((job, now))
        numbers = [each.number for each, _ in chosen]
        follows = job.done and job.number in alike and len(set(numbers)) == len(numbers)
        if len(chosen) > 1 and not (follows and all(_as_good(each, now, alone) for each, alone in chosen)):
            chosen.pop()
            break
        if not job.done:  # a prompt is a step of its own
            break
        left[job.number] = job.stepped(now)
        if not left[job.number].left:
            del left[job.number]
    return [job for job, _ in chosen]


def _as_good(job: Job, now: float, alone: float) -> bool:
    """Tell whether the next token of a job keeps now what it would keep alone."""
    return job.left > 1 or job.stepped(now).keeps(now) or not job.stepped(alone).keeps(alone)


def promises(jobs: Sequence[Job], now: float, at_once: int = 1) -> Mapping[int, Promise]:
    """Return what every job will get, by number: all steps are played through, one after the other.

    Args:
        jobs: That are not done, each with one token to come at least.
        now: When the next step begins.
        at_once: As of :func:`begun_or_urgent`.
    """
    found = {}
    candidates, later = begun_or_urgent(jobs, at_once)
    waiting = [(job.urgency, job) for job in candidates]  # no two are equal: numbers differ
    heapq.heapify(waiting)
    queue = deque(later)
    while waiting:
        _, job = waiting[0]
        now += job.next_takes
        job = job.stepped(now)
        if job.left:
            heapq.heapreplace(waiting, (job.urgency, job))
            continue
        heapq.heappop(waiting)
        if job.is_patient and queue:
            heapq.heappush(waiting, (queue[0].urgency, queue.popleft()))
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
