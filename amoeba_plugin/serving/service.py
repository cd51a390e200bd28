"""The elastic service: one worker, many requests, each at the shape that its targets allow."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from amoeba_plugin.errors import BusyError, DataError, ServiceError, SloError
from amoeba_plugin.serving.answer import Answer, End, Piece, Request
from amoeba_plugin.serving.backend import Backend
from amoeba_plugin.serving.deciders import Decider, decided
from amoeba_plugin.serving.feasible import Asked, Decision, Feasible, LatencyOf, Prompt, feasible
from amoeba_plugin.serving.reading import Reader, Reading, kept_positions
from amoeba_plugin.serving.sampling import Sampler, likeliest
from amoeba_plugin.serving.schedule import Job, admits, computed_with, most_urgent, promises
from amoeba_plugin.serving.slo import Latency, Limits

logger = logging.getLogger(__name__)
MOST_WAITING = 64  # requests that were taken and are not done


@dataclass
class Running:
    """A request that was taken."""

    job: Job
    request: Request
    decision: Decision
    answer: Answer
    sampler: Sampler
    cache: Any = None
    last: int = 0  # token that was drawn
    at: float = 0.0  # when
    cancelled: bool = False

    @property
    def measured(self) -> Latency | None:
        """Of the tokens that are there; ``None``: none is."""
        job = self.job
        if job.first is None:
            return None
        return Latency(job.first - job.came, (self.at - job.first) / (job.done - 1) if job.done > 1 else 0.0)


class ElasticService:
    """Answers requests on one model, a step at a time; its worker is a thread.

    What cannot keep its targets, behind what was taken before it, is refused at once, with the reason. Use it as a
    context manager, or close it.

    Args:
        backend: Computes.
        latency_of: Returns what a shape takes on so many tokens.
        decider: Chooses among what is feasible.
        reader: Reads prompts before they are computed; without one nothing of a prompt is left out.
        most_waiting: Requests that may be taken and not done.
        clock: In seconds.
    """

    def __init__(
        self, backend: Backend, latency_of: LatencyOf, decider: Decider = lambda found, reading: None,
        reader: Reader | None = None, most_waiting: int = MOST_WAITING,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._backend, self._latency_of, self._clock = backend, latency_of, clock
        self._decider, self._reader = decider, reader
        self._most, self._numbers = most_waiting, itertools.count()
        self._running: dict[int, Running] = {}
        self._step: tuple[frozenset[int], float] | None = None  # whose step is computed, and when it will be done
        self._wake, self._closing = threading.Condition(), False
        self._worker = threading.Thread(target=self._work, name="elastic service", daemon=True)
        self._worker.start()

    def __enter__(self) -> ElasticService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Request) -> Answer:
        """Take a request.

        Raises:
            DataError: If it has no tokens, wants none, or wants more than the model has positions for.
            ServiceError: If the service is closed, or too many requests wait.
            SloError: If its targets cannot be kept, and it does not allow to be answered below them; a ``BusyError``
                where they could, were it not for what was taken before.
            ShapeError: If it names a shape that the model has not.
        """
        came = self._clock()
        _require_possible(request, self._backend.context)
        self._require_room()
        reading = None if self._reader is None else self._reader(request)
        with self._wake:
            self._require_room()
            decision, job, promised, in_time = self._taken(request, reading, came)
            kept = _kept(request, reading, decision)
            answer = Answer(decision, kept, promised, in_time, lambda: self._cancel(job.number))
            running = Running(job, request, decision, answer, Sampler(request.sampling))
            self._running[job.number] = running
            self._wake.notify_all()
        return answer

    def close(self, finish: bool = True) -> None:
        """End the service.

        Args:
            finish: Answer what was taken first; else it is cancelled.
        """
        with self._wake:
            self._closing = True
            for running in self._running.values():
                running.cancelled |= not finish
            self._wake.notify_all()
        self._worker.join()

    @property
    def waiting(self) -> int:
        """Requests that were taken and are not done."""
        return len(self._running)

    @property
    def backlog(self) -> float:
        """Seconds until all that was taken is done, by prediction."""
        with self._wake:
            now = self._clock()
            return self._begins(now) - now + sum(job.rest for job in self._jobs())

    def _require_room(self) -> None:
        if self._closing:
            raise ServiceError("the service is closing, and takes no more requests")
        if len(self._running) >= self._most:
            raise ServiceError(f"{self._most} requests are waiting, as many as may; ask again later")

    def _taken(self, request: Request, reading: Reading | None, came: float) -> tuple[Decision, Job, Latency, bool]:
        """Return what a request gets, its job, what it is promised, and whether that keeps its targets."""
        now = self._clock()
        asked = Asked(_prompt(request, reading), request.most, request.slo, now - came)
        found = feasible(self._backend.space, self._latency_of, asked)
        found = found if request.shape is None else found.at(self._backend.space.require(request.shape))
        limits = asked.slo.limits(found.whole)  # from when it came
        number, jobs, begins = next(self._numbers), self._jobs(), self._begins(now)
        at_once = self._backend.at_once

        def job_of(decision: Decision, limits: Limits) -> Job:
            return Job(number, came, limits, found.latencies[decision], request.most)

        try:
            first, before = decided(self._decider, found, reading), promises(jobs, begins, at_once)

            def is_admitted(decision: Decision) -> bool:
                return admits(before, promises([*jobs, job_of(decision, limits)], begins, at_once), number)

            decision = first if is_admitted(first) else _heaviest(_lighter(found, first), is_admitted)
            if decision is not None:
                job = job_of(decision, limits)
                return decision, job, promises([*jobs, job], begins, at_once)[number].latency, True
            raise BusyError(
                f"{len(self._running)} requests were taken before, and behind them no shape keeps its targets "
                f"({request.slo}); ask again later, or for more time"
            )
        except SloError:
            if not request.best_effort:
                raise
        lightest = min(found.latencies, key=lambda each: found.latencies[each].total(request.most))
        job = job_of(lightest, Limits())
        return lightest, job, promises([*jobs, job], begins, at_once)[number].latency, False

    def _jobs(self) -> list[Job]:
        """Return what is left to do behind the step that is computed now."""
        jobs = []
        for running in self._running.values():
            job = running.job
            if self._step is not None and job.number in self._step[0]:
                job = job.stepped(self._step[1])
            jobs += [job] if job.left and not running.cancelled else []
        return jobs

    def _begins(self, now: float) -> float:
        return now if self._step is None else max(now, self._step[1])

    def _cancel(self, number: int) -> None:
        with self._wake:
            if number in self._running:
                self._running[number].cancelled = True
                self._wake.notify_all()

    def _work(self) -> None:
        while (several := self._next()) is not None:
            for running, logits in zip(several, self._computed(several), strict=True):
                self._answer(running, logits)

    def _computed(self, several: Sequence[Running]) -> Sequence[Tensor | None]:
        """Return the logits of requests whose tokens are one step; ``None``: each is still to be computed."""
        if len(several) > 1:
            caches, tokens = [each.cache for each in several], [each.last for each in several]
            try:
                return self._backend.steps(several[0].decision.shape, caches, tokens)
            except Exception:
                logger.exception("requests failed together, and are computed one by one")
        return [None] * len(several)

    def _answer(self, running: Running, logits: Tensor | None) -> None:
        try:
            logits = self._alone(running) if logits is None else logits
            piece = Piece(*running.sampler.draw(logits), likeliest(logits, running.request.alternatives))
        except Exception as error:  # whatever a model raises ends this answer, and no other
            self._end(running, "failed", f"{type(error).__name__}: {error}")
            logger.exception("a request failed")  # afterwards: a log may be slow
            return
        self._record(running, piece)

    def _next(self) -> list[Running] | None:
        """Return whose step is next, once there is one; ``None``: the service is over.

        Of several requests at one shape each gets a token.
        """
        with self._wake:
            while True:
                for running in [each for each in self._running.values() if each.cancelled]:
                    self._end(running, "cancelled")
                if self._running:
                    now = self._clock()
                    jobs = self._together([each.job for each in self._running.values()], now)
                    self._step = frozenset(job.number for job in jobs), now + sum(job.next_takes for job in jobs)
                    return [self._running[job.number] for job in jobs]
                self._step = None
                if self._closing:
                    return None
                self._wake.wait()

    def _together(self, jobs: list[Job], now: float) -> list[Job]:
        """Return the most urgent job, and those whose next tokens are computed with its own."""
        at_once = self._backend.at_once
        first = most_urgent(jobs, at_once)
        if at_once == 1 or not first.done:
            return [first]
        shapes = {job.number: self._running[job.number].decision.shape for job in jobs}
        alike = [number for number, shape in shapes.items() if shape == shapes[first.number]]
        return computed_with(jobs, alike, now, at_once)

    def _alone(self, running: Running) -> Tensor:
        shape = running.decision.shape
        if running.job.done:
            return self._backend.step(shape, running.cache, running.last)
        tokens = running.request.tokens
        running.cache, logits = self._backend.prefill(shape, [tokens[each] for each in running.answer.kept])
        return logits

    def _record(self, running: Running, piece: Piece) -> None:
        with self._wake:
            running.at, running.last = self._clock(), piece.token
            self._is_done(running)
            running.job = running.job.stepped(running.at)
            ends = piece.token in running.request.ends
            if not ends:
                running.answer.put(piece)
            if ends or not running.job.left:
                self._end(running, "stop" if ends else "length")

    def _is_done(self, running: Running) -> None:
        """Say that a request's step is over; of others that are computed with it, it may not be."""
        if self._step is not None:
            others = self._step[0] - {running.job.number}
            self._step = (others, self._step[1]) if others else None

    def _end(self, running: Running, end: End, error: str = "") -> None:
        with self._wake:
            self._is_done(running)
            running.cache = None
            del self._running[running.job.number]
            running.answer.close(end, running.measured, error)


def _require_possible(request: Request, context: int | None) -> None:
    tokens, droppable = len(request.tokens), list(request.droppable)
    if not tokens or request.most < 1:
        raise DataError("a request has a token of prompt at least, and asks for one at least")
    if context is not None and tokens + request.most > context:
        raise DataError(
            f"{tokens} tokens of prompt and {request.most} of answer are {tokens + request.most}, and the model has "
            f"{context} positions; shorten the prompt, or ask for fewer tokens"
        )
    if sorted({*droppable} & {*range(tokens)}) != droppable:
        raise DataError(f"positions that may be left out must ascend, and lie in the prompt of {tokens} tokens")
    if len(droppable) == tokens:
        raise DataError("the whole prompt may be left out; something of it has to stay, such as the question")


def _prompt(request: Request, reading: Reading | None) -> Prompt:
    return Prompt(len(request.tokens), 0 if reading is None else len(request.droppable))


def _kept(request: Request, reading: Reading | None, decision: Decision) -> Sequence[int]:
    tokens = len(request.tokens)
    if reading is None:
        return range(tokens)
    return kept_positions(tokens, request.droppable, reading.scores, _prompt(request, reading).kept(decision.share))


def _lighter(found: Feasible, first: Decision) -> list[Decision]:
    """Return the feasible decisions that take less than one, those first that take longest."""
    took = {each: found.latencies[each].total(found.answer) for each in found.decisions}
    return sorted((each for each in took if took[each] < took[first]), key=took.__getitem__, reverse=True)


def _heaviest(decisions: Sequence[Decision], is_admitted: Callable[[Decision], bool]) -> Decision | None:
    """Return the first that is admitted, as if all behind it were, too: every try plays all requests through."""
    at = bisect_left(range(len(decisions)), True, key=lambda index: is_admitted(decisions[index]))
    return decisions[at] if at < len(decisions) else None
