"""Steps of many requests on one worker, against a clock that ticks, and against what a request gets alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.serving.schedule import Job, admits, most_urgent, promises
from amoeba_plugin.serving.slo import Latency, Limits

times = st.integers(1, 20).map(float)
latencies = st.builds(Latency, times, times)
limits = st.builds(Limits, times.map(lambda t: 5 * t) | st.just(math.inf), times | st.just(math.inf)) | st.builds(
    Limits, total=times.map(lambda t: 20 * t)
)


@st.composite
def several(draw: st.DrawFn, most: int = 5) -> list[Job]:
    return [
        Job(number, draw(times), draw(limits), draw(latencies), draw(st.integers(1, 6)))
        for number in range(draw(st.integers(1, most)))
    ]


def ticked(jobs: list[Job], now: float) -> dict[int, list[float]]:
    """Return when every token of every job is there, by a worker that looks for its next step at every tick."""
    found: dict[int, list[float]] = {job.number: [] for job in jobs}
    busy: tuple[int, float] | None = None
    clock = now
    while any(len(found[job.number]) < job.answer for job in jobs):
        if busy is not None and clock == busy[1]:
            found[busy[0]].append(clock)
            busy = None
        if busy is None:
            due = {}
            for job in jobs:
                there = found[job.number]
                if len(there) == job.answer:
                    continue
                others = (job.answer - len(there) - 1) * job.latency.tpot
                pace = there[0] + len(there) * job.limits.tpot if there else job.came + job.limits.ttft
                due[job.number] = (min(pace, job.came + job.limits.total - others), job.came, job.number)
            if due:
                number = min(due, key=lambda each: due[each])
                job = jobs[number]
                busy = (number, clock + (job.latency.tpot if found[number] else job.latency.ttft))
        clock += 1
    return found


@given(several())
def test_promises_are_what_a_ticking_clock_shows(jobs: list[Job]):
    now = 20.0
    promised, shown = promises(jobs, now), ticked(jobs, now)
    for job in jobs:
        at = shown[job.number]
        mean = (at[-1] - at[0]) / (job.answer - 1) if job.answer > 1 else 0.0
        found = promised[job.number]
        assert (found.latency.ttft, found.latency.tpot) == pytest.approx((at[0] - job.came, mean))
        kept = at[0] - job.came <= job.limits.ttft and mean <= job.limits.tpot + 1e-9
        assert found.kept == (kept and at[-1] - job.came <= job.limits.total)


@given(several())
def test_no_work_is_lost_and_the_worker_never_idles(jobs: list[Job]):
    found = promises(jobs, 20.0)
    last = max(job.came + found[job.number].latency.total(job.answer) for job in jobs)
    assert last == pytest.approx(20.0 + sum(job.latency.total(job.answer) for job in jobs))
    assert found.keys() == {job.number for job in jobs}


@given(latencies, st.integers(1, 6), limits)
def test_alone_a_request_takes_what_its_steps_take(latency: Latency, answer: int, limit: Limits):
    (promise,) = promises([Job(7, 3.0, limit, latency, answer)], 3.0).values()
    assert promise.kept == limit.kept_by(Latency(latency.ttft, latency.tpot if answer > 1 else 0.0), answer)
    assert promise.latency.ttft == pytest.approx(latency.ttft)


@given(several(4), several(1))
def test_who_is_admitted_takes_from_nobody_what_was_promised(jobs: list[Job], new: list[Job]):
    other = Job(9, 20.0, new[0].limits, new[0].latency, new[0].answer)
    before, behind = promises(jobs, 20.0), promises([*jobs, other], 20.0)
    if admits(before, behind, 9):
        assert behind[9].kept
        assert all(behind[number].kept for number, each in before.items() if each.kept)
    else:
        assert not behind[9].kept or any(each.kept and not behind[number].kept for number, each in before.items())


@given(several())
def test_a_run_that_is_looked_at_in_the_middle_goes_on_as_promised(jobs: list[Job]):
    whole, now, waiting = promises(jobs, 20.0), 20.0, list(jobs)
    for _ in range(3):
        if len(waiting) == 1 and waiting[0].left == 1:
            return
        job = most_urgent(waiting)
        waiting.remove(job)
        now += job.next_takes
        if job.left > 1:
            waiting.append(job.stepped(now))
    for number, promise in promises(waiting, now).items():
        assert (promise.latency.ttft, promise.kept) == (pytest.approx(whole[number].latency.ttft), whole[number].kept)


def test_requests_without_targets_come_last_and_in_order():
    takes = Latency(1.0, 1.0)
    urgent = Job(2, 3.0, Limits(ttft=10.0, tpot=9.0), takes, 2)
    first, second = Job(0, 1.0, Limits(), takes, 2), Job(1, 2.0, Limits(), takes, 2)
    assert most_urgent([first, second, urgent]) == urgent
    assert most_urgent([second, first]) == first
