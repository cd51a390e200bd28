"""Plans against brute force on costs that are known, and on a model whose steps are measured."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from amoeba_plugin.errors import BudgetError
from amoeba_plugin.runtime.units import BYTES, DURATIONS, quantity
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.planner import (
    GROWTH,
    STATE_BYTES,
    CostModel,
    Job,
    Plan,
    Probe,
    choose,
    fits,
    fitting,
    possible_plans,
    probes_of,
)
from amoeba_plugin.training.layer_tuning.probing import Planned, plan_training
from amoeba_plugin.training.layer_tuning.tune import tune_layers
from amoeba_plugin.training.layer_tuning.windows import Window
from support.batches import make_rows
from support.models import tiny_llama
from support.training import make_arguments, parameters_of

JOB = Job(depths=(2, 5, 8), steps=10, sequences=6, rows=20, length=100, mean_length=100.0, layer_parameters=1000,
          state_bytes=10, may_cache=True)  # fmt: skip


def true_seconds(plan: Plan, window: Window, computed: float = 1.0) -> float:
    """Return what a micro-batch takes on a machine that is made up, and a step beside its micro-batches."""
    layers, rows = window.depth - window.first, plan.micro_batch
    micro = rows * (0.1 * window.first * computed + 0.3 * layers * (1.4 if plan.checkpointing else 1) + 0.2)
    return plan.accumulation * (micro + 0.02) + 0.05 * layers + 0.01


def true_memory(plan: Plan, window: Window) -> float:
    layers, rows = window.depth - window.first, plan.micro_batch
    kept = 3e6 * rows * layers if not plan.checkpointing else 4e5 * rows * layers + 3e6 * rows
    return 1e8 + 2e6 * layers + 1e6 * rows + kept


def measured(job: Job) -> list[Probe]:
    return [
        Probe(
            plan, window, true_seconds(plan, window), 2 * true_seconds(plan, window), round(true_memory(plan, window))
        )
        for plan, window in probes_of(job)
    ]


def test_costs_that_are_linear_are_found_of_every_plan():
    model = CostModel.of(measured(JOB))
    for plan in possible_plans(JOB):
        windows = [window for window, _ in JOB.windows(plan)]
        # each exit sees 20 of the 60 sequences, and there are 20 rows: what is kept is not read, and each row ran alone
        alone = sum(0.02 * 6 for window in windows if plan.cached and window.first)
        seconds = 10 * (sum(true_seconds(plan, window) for window in windows) + alone) / 3
        trained = [window.depth - window.first for window in windows]
        memory = max(true_memory(plan, window) for window in windows)
        memory += STATE_BYTES * 1000 * (sum(trained) - max(trained)) + (20 * 100 * 10 if plan.cached else 0)
        costs = model.costs(plan, JOB)
        assert costs.seconds == pytest.approx(seconds, rel=1e-3)
        assert costs.cpu_seconds == pytest.approx(2 * seconds, rel=1e-3)
        assert costs.memory == pytest.approx(GROWTH * memory, rel=1e-3)


def test_what_is_kept_is_computed_once():
    model, plan = CostModel.of(measured(JOB)), Plan(1, 6)
    thrice = replace(JOB, steps=30)  # each exit sees every row three times
    saved = model.costs(plan, thrice).seconds - model.costs(replace(plan, cached=True), thrice).seconds
    bottoms = sum(0.1 * window.first for window, _ in JOB.windows(plan)) / 3 * 30 * 6
    alone = 2 / 3 * 0.02 * 30 * 6 / 3  # rows of the two exits that have a bottom, run by themselves
    assert saved == pytest.approx(2 / 3 * bottoms - alone, rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(memory=st.floats(1.0e8, 2.2e8), deadline=st.none() | st.floats(5, 120))
def test_the_most_layers_within_the_limits_and_then_the_fastest(memory: float, deadline: float | None):
    model = CostModel.of(measured(JOB))
    possible = []
    for window, rows, checkpointing, cached in itertools.product(
        (None, 2, 1), (1, 2, 3, 6), (False, True), (False, True)
    ):
        plan = Plan(rows, 6 // rows, window, checkpointing, False, cached)
        costs = model.costs(plan, JOB)
        if costs.memory <= memory and (deadline is None or costs.seconds <= deadline):
            possible.append((-sum(each.depth - each.first for each, _ in JOB.windows(plan)), costs.seconds))
    if not possible:
        with pytest.raises(BudgetError, match="no plan trains within"):
            choose(model, JOB, memory, deadline)
        return
    plan, costs = choose(model, JOB, memory, deadline)
    assert (-sum(each.depth - each.first for each, _ in JOB.windows(plan)), costs.seconds) == min(possible)
    assert costs.memory <= memory


def test_windows_of_branches_end_at_the_exit_below():
    for apart, expected in ((True, [(0, 2), (2, 5), (5, 8)]), (False, [(0, 2), (1, 5), (4, 8)])):
        job = replace(JOB, window=4, apart=apart)
        assert [(window.first, window.depth) for window, _ in job.windows(Plan(1, 6))] == expected
        widest = job.widest
        assert (widest.first, widest.depth) == ((5, 8) if apart else (4, 8))
        assert max(plan.window or 0 for plan in possible_plans(job)) == widest.depth - widest.first - 1


def test_limits_out_of_reach_name_what_would_do():
    model = CostModel.of(measured(JOB))
    with pytest.raises(BudgetError, match=r"within 0.05 GiB; the least memory that would do is 0.1. GiB: 6 x 1 seq"):
        choose(model, JOB, 0.05 * 2**30, None)
    with pytest.raises(BudgetError, match=r"within 0.20 GiB and 1.0 s; within that memory the fastest takes"):
        choose(model, JOB, 0.2 * 2**30, 1.0)


def test_no_step_is_measured_that_would_not_fit():
    probes: list[Probe] = []
    limit = 1.13e8
    for asked, at in probes_of(JOB):
        plan, window = fitting(probes, asked, at, limit, 1e8)
        assert fits(probes, plan, window, limit, 1e8)
        assert plan.micro_batch <= asked.micro_batch
        assert window.first >= at.first
        probes.append(Probe(plan, window, 1.0, 1.0, round(true_memory(plan, window))))
    assert all(probe.memory <= limit for probe in probes)
    assert {probe.plan.micro_batch for probe in probes} == {1, 2}  # of four there is no room


@pytest.mark.parametrize(("text", "value"), [("1GiB", 2**30), ("1.5 GB", 1.5e9), ("300MB", 3e8)])
def test_memory_has_units(text: str, value: float):
    assert quantity(text, BYTES) == value
    for wrong in ("1", "GiB", "-1GiB", "0GiB", "1 min", "1e3MB"):
        with pytest.raises(BudgetError, match="give a number above 0 and one of B, kB"):
            quantity(wrong, BYTES)
    assert quantity("20min", DURATIONS) == 1200


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_planning_leaves_no_trace_and_the_plan_is_what_runs(kind: str, tmp_path: Path):
    exits = Exits(tiny_llama(), [2, 4], stacked=kind == "none")
    model = exits.model
    if kind == "lora":
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=exits.modules_to_save)
        model = get_peft_model(exits.model, config)
    arguments = make_arguments(tmp_path, max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    rows, options = make_rows(), LayerTuningOptions()
    before, learns = parameters_of(model), {name for name, value in model.named_parameters() if value.requires_grad}
    planned = plan_training(model, exits, rows, options, arguments, memory=64e9, deadline=3600)
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(model).items())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == learns
    assert planned.window is None  # all that was asked for fits
    assert planned.micro_batch * planned.accumulation == 4
    planned.save(tmp_path / "plan.json")
    assert Planned.kept_in(tmp_path) == planned
    seen = []
    done = planned.run(lambda how, given: seen.append((how, given)) or tune_layers(model, exits, rows, how, given),
                       options, arguments)  # fmt: skip
    ((how, given),) = seen
    assert given.per_device_train_batch_size == planned.micro_batch
    assert given.gradient_checkpointing == planned.checkpointing
    assert how.cache_gib == planned.cache_gib
    assert set(done.took) == {"seconds", "cpu_seconds", "memory"}
    with pytest.raises(BudgetError, match="with the model alone"):
        plan_training(model, exits, rows, options, arguments, memory=1e6)
