"""Windows and schedules: every layer in its window, every exit its share, the same draws at every run."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.training.layer_tuning.windows import (
    POLICIES,
    Schedule,
    require_policy,
    require_weights,
    windows_below,
)

depths = st.sets(st.integers(1, 40), min_size=1, max_size=6).map(sorted)


@given(depths=depths)
def test_windows_down_to_the_exit_below_hold_every_layer_once(depths: list[int]):
    windows = windows_below(depths)
    assert [sum(layer in window for window in windows) for layer in range(depths[-1] + 1)] == [1] * depths[-1] + [0]
    assert [window.depth for window in windows] == depths


@given(depths=depths, size=st.integers(1, 50))
def test_a_window_has_so_many_layers_or_all_there_are(depths: list[int], size: int):
    for window in windows_below(depths, size):
        assert window.depth - window.first == min(size, window.depth)


@given(depths=depths, policy=st.sampled_from(sorted(POLICIES)), phase=st.integers(1, 5), steps=st.integers(1, 60),
       seed=st.integers(0, 9))  # fmt: skip
def test_draws_depend_on_seed_and_step_alone(depths: list[int], policy: str, phase: int, steps: int, seed: int):
    windows = windows_below(depths)
    schedule, again = (Schedule(windows, policy, (), phase, steps, seed) for _ in range(2))
    drawn = [schedule.at(step) for step in range(steps)]
    assert drawn == [again.at(step) for step in reversed(range(steps))][::-1]
    assert all(drawn[step] == drawn[step - step % phase] for step in range(steps))  # one per phase
    assert set(drawn) <= set(windows)


@given(depths=depths, drawn=st.data(), times=st.integers(1, 4))
def test_a_sequential_training_gives_each_exit_its_share_from_below(
    depths: list[int], drawn: st.DataObject, times: int
):
    windows = windows_below(depths)
    parts = tuple(drawn.draw(st.lists(st.integers(1, 5), min_size=len(windows), max_size=len(windows))))
    steps = times * sum(parts)
    found = [Schedule(windows, "sequential", parts, max_steps=steps).at(step) for step in range(steps)]
    assert found == [window for window, part in zip(windows, parts, strict=True) for _ in range(times * part)]


def test_random_draws_follow_the_weights():
    windows = windows_below([1, 2, 3])
    schedule = Schedule(windows, "random", (1, 2, 5), max_steps=4000, seed=1)
    counted = Counter(schedule.at(step).depth for step in range(4000))
    assert [counted[depth] / 4000 for depth in (1, 2, 3)] == pytest.approx([1 / 8, 1 / 4, 5 / 8], abs=0.03)
    assert [Schedule(windows, "cyclic").at(step).depth for step in range(5)] == [1, 2, 3, 1, 2]


def test_impossible_draws_are_refused():
    for weights in ((1, 0), (1,), (1, 2, 3)):
        with pytest.raises(RecipeError, match="of 2 exits: give one number above 0 for each"):
            require_weights(weights, 2)
    require_weights((), 2)
    with pytest.raises(RecipeError, match="choose one of random, cyclic, sequential"):
        require_policy("best", 1)
    with pytest.raises(RecipeError, match="phase_steps 0"):
        require_policy("random", 0)
