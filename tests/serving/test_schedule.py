"""Steps of many requests on one worker, against a clock that ticks, and against what a request gets alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.serving.schedule import Job, admits, computed_with, most_urgent, promises
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


def ticked(jobs: list[Job], now: float, at_once: int) -> dict[int, list[float]]:
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
            patient = [job for job in sorted(jobs, key=lambda job: (job.came, job.number)) if job.limits == Limits()]
            begun = [job for job in patient if 0 < len(found[job.number]) < job.answer]
            fresh = [job.number for job in patient if not found[job.number]]
            for job in jobs:
                there = found[job.number]
                if len(there) == job.answer or job.number in fresh[max(0, at_once - len(begun)) :]:
                    continue
                others = (job.answer - len(there) - 1) * job.latency.tpot
                pace = there[0] + len(there) * job.limits.tpot if there else job.came + job.limits.ttft
                turn = len(there) if job in patient else -1
                due[job.number] = (min(pace, job.came + job.limits.total - others), turn, job.came, job.number)
            if due:
                number = min(due, key=lambda each: due[each])
                job = jobs[number]
                busy = (number, clock + (job.latency.tpot if found[number] else job.latency.ttft))
        clock += 1
    return found


@given(several(), st.integers(1, 3))
def test_promises_are_what_a_ticking_clock_shows(jobs: list[Job], at_once: int):
    now = 20.0
    promised, shown = promises(jobs, now, at_once), ticked(jobs, now, at_once)
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


@given(several(), st.integers(1, 3))
def test_a_run_that_is_looked_at_in_the_middle_goes_on_as_promised(jobs: list[Job], at_once: int):
    whole, now, waiting = promises(jobs, 20.0, at_once), 20.0, list(jobs)
    for _ in range(3):
        if len(waiting) == 1 and waiting[0].left == 1:
            return
        job = most_urgent(waiting, at_once)
        waiting.remove(job)
        now += job.next_takes
        if job.left > 1:
            waiting.append(job.stepped(now))
    for number, promise in promises(waiting, now, at_once).items():
        assert (promise.latency.ttft, promise.kept) == (pytest.approx(whole[number].latency.ttft), whole[number].kept)


def test_requests_without_targets_come_last_and_in_order():
    takes = Latency(1.0, 1.0)
    urgent = Job(2, 3.0, Limits(ttft=10.0, tpot=9.0), takes, 2)
    first, second = Job(0, 1.0, Limits(), takes, 2), Job(1, 2.0, Limits(), takes, 2)
    assert most_urgent([first, second, urgent]) == urgent
    assert most_urgent([second, first]) == first
    begun = first.stepped(4.0)
    assert most_urgent([begun, second]) == begun
    assert most_urgent([begun, second], at_once=2) == second
    assert most_urgent([begun, second.stepped(5.0)], at_once=2) == begun


@given(several(6), st.data())
def test_behind_what_is_computed_together_all_is_as_one_by_one(jobs: list[Job], data: st.DataObject):
    jobs = [job.stepped(19.0) if job.answer > 1 and data.draw(st.booleans()) else job for job in jobs]
    alike, most = data.draw(st.sets(st.sampled_from(range(6)))), data.draw(st.integers(1, 6))
    before, clock = promises(jobs, 20.0, most), 20.0
    chosen = computed_with(jobs, alike, clock, most)
    assert chosen[0] == most_urgent(jobs, most)
    assert 1 <= len(chosen) <= most
    left = {job.number: job for job in jobs}
    for job in chosen:  # they are next, one after the other
        assert most_urgent(list(left.values()), most) == job
        clock += job.next_takes
        left[job.number] = job.stepped(clock)
        if job.left == 1:
            del left[job.number]
    if len(chosen) > 1:
        assert all(job.done for job in chosen)
        assert {job.number for job in chosen[1:]} <= alike
    for job in chosen:  # all are there at the end of the step
        if job.left == 1:
            assert job.stepped(clock).keeps(clock) or not before[job.number].kept
        else:
            left[job.number] = job.stepped(clock)
    for number, promise in promises(list(left.values()), clock, most).items():
        assert promise.kept or not before[number].kept


def test_all_that_follow_are_computed_together():
    takes = Latency(1.0, 1.0)
    patient = [Job(number, 1.0, Limits(), takes, 9).stepped(2.0) for number in range(4)]
    assert computed_with(patient, range(4), 3.0, 8) == patient
    assert computed_with(patient, range(4), 3.0, 3) == patient[:3]
    assert computed_with(patient, [0, 1, 3], 3.0, 8) == patient[:2]  # 2, of another shape, is next
    hurried = Job(7, 1.0, Limits(tpot=2.5), takes, 9).stepped(2.0)  # whose tokens are next, again and again
    assert computed_with([*patient, hurried], range(8), 3.0, 8) == [hurried]
    last = Job(8, 1.0, Limits(total=3.5), takes, 2).stepped(2.0)  # due at 4.5
    soon = Job(9, 1.0, Limits(total=4.0), takes, 2).stepped(2.0)
    assert computed_with([last, soon], range(10), 3.0, 8) == [last]
    assert computed_with([last, soon], range(10), 2.0, 8) == [last, soon]
