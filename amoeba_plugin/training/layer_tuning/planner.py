"""How a training fits a machine: micro-batch, window, checkpointing, dtype and cache, by costs measured on a few steps.

Edge-LLM (arXiv:2406.15758) names scheduling its third part and does not say what it searches; what is here is this
package's own. Time and memory are taken to be linear in what a step runs, and fitted to steps that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from amoeba_plugin.errors import BudgetError
from amoeba_plugin.training.layer_tuning.windows import Window, windows_below

GIB = 2**30
STATE_BYTES = 8  # of AdamW, per parameter
GROWTH = 1.06  # of a process over a whole training, against the few steps that are measured: 1.02 to 1.05 were seen


@dataclass(frozen=True)
class Plan:
    """How each step runs.

    Attributes:
        micro_batch: Sequences of a forward.
        accumulation: Forwards of a step.
        window: Layers trained below an exit; ``None``: down to the exit below.
        checkpointing: Recompute activations.
        half: Layers below the window compute in bfloat16.
        cached: What they give is kept.
    """

    micro_batch: int
    accumulation: int
    window: int | None = None
    checkpointing: bool = False
    half: bool = False
    cached: bool = False

    @property
    def in_words(self) -> str:
        """What it is, in a sentence."""
        window = "windows as asked for" if self.window is None else f"windows of {self.window} layers"
        more = [", activations recomputed"] * self.checkpointing + [", bottoms in bfloat16"] * self.half
        more += [", bottoms kept"] * self.cached
        return f"{self.accumulation} x {self.micro_batch} sequences a step, {window}{''.join(more)}"


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        depths: Of the exits.
        weights: How often each is trained; empty: all alike.
        window: Layers of a window, at most; ``None``: down to the exit below.
        apart: No window reaches below the exit below.
        steps: Of the optimizer.
        sequences: Of a step.
        rows: To train on.
        length: Tokens of the longest.
        mean_length: Tokens of a row in the mean.
        layer_parameters: That are trained, of one layer.
        state_bytes: Of a row that is kept, per token.
        bottoms: How many layers windows begin at, states into which are kept at the same time.
        keep_states: Keep the optimizer's states of layers that leave the window.
        may_cache: What is below windows does not change.
        may_half: bfloat16 is another dtype than the weights', and the machine has instructions for it.
    """

    depths: tuple[int, ...]
    steps: int
    sequences: int
    rows: int
    length: int
    mean_length: float
    layer_parameters: int
    state_bytes: int
    weights: tuple[float, ...] = ()
    bottoms: int = 1
    window: int | None = None
    apart: bool = False
    keep_states: bool = True
    may_cache: bool = False
    may_half: bool = False

    def windows(self, plan: Plan) -> list[tuple[Window, float]]:
        """Return the windows of a plan, each with its share of the steps."""
        weights = self.weights or (1.0,) * len(self.depths)
        windows = windows_below(self.depths, plan.window or self.window, self.apart)
        return [(window, weight / sum(weights)) for window, weight in zip(windows, weights, strict=True)]

    @property
    def widest(self) -> Window:
        """The window of the most layers, and of those the deepest, of all that is asked for."""
        windows = windows_below(self.depths, self.window, self.apart)
        return max(windows, key=lambda each: (each.depth - each.first, each.depth))

    @property
    def epochs(self) -> float:
        """How often every row is seen."""
        return self.steps * self.sequences / self.rows

    @property
    def cache_bytes(self) -> int:
        """What keeping all rows takes."""
        return round(self.bottoms * self.rows * self.mean_length * self.state_bytes)


@dataclass(frozen=True)
class Probe:
    """A step that was measured.

    Attributes:
        plan: How it ran.
        window: That it trained.
        seconds: It took.
        cpu_seconds: It took of the CPU.
        memory: The most bytes of the process meanwhile.
    """

    plan: Plan
    window: Window
    seconds: float
    cpu_seconds: float
    memory: int


@dataclass(frozen=True)
class Costs:
    """What a whole training takes.

    Attributes:
        seconds: Of time.
        cpu_seconds: Of the CPU.
        memory: Bytes of the process, at most.
    """

    seconds: float
    cpu_seconds: float
    memory: float


@dataclass(frozen=True)
class CostModel:
    """Costs of any plan, fitted to those that were measured; no part of a step costs less than nothing."""

    seconds: np.ndarray
    cpu_seconds: np.ndarray
    memory: np.ndarray
    probes: tuple[Probe, ...]

    def covers(self, plan: Plan, job: Job) -> bool:
        """Tell whether steps were measured from which a plan's follow: of several rows, and layers, if it has them."""
        alike = [probe for probe in self.probes if probe.plan.checkpointing == plan.checkpointing]
        rows = max((probe.plan.micro_batch for probe in alike), default=0)
        layers = max((probe.window.depth - probe.window.first for probe in alike), default=0)
        wanted = max(window.depth - window.first for window, _ in job.windows(plan))
        return rows >= min(plan.micro_batch, 2) and layers >= min(wanted, 2)

    @classmethod
    def of(cls, probes: Sequence[Probe]) -> CostModel:
        """Fit to steps, one at least; relative errors count alike."""
        timed = np.array([_timed(probe.plan, probe.window) for probe in probes])
        held = np.array([_held(probe.plan, probe.window) for probe in probes])
        return cls(
            _fit(timed, [probe.seconds for probe in probes]),
            _fit(timed, [probe.cpu_seconds for probe in probes]),
            _fit(held, [probe.memory for probe in probes]),
            tuple(probes),
        )

    def costs(self, plan: Plan, job: Job) -> Costs:
        """Return what a training by a plan takes."""
        shorter = job.mean_length / job.length
        times: list[float] = []
        for coefficients in (self.seconds, self.cpu_seconds):
            step = 0.0
            for window, share in job.windows(plan):
                features = np.array(_timed(plan, window))
                if plan.cached and window.first:  # each row once, and alone
                    computed = 1 / max(1.0, share * job.epochs)
                    features[BOTTOMS] *= computed
                    features[MICRO_BATCHES] += computed * job.sequences
                features[ROWS] *= shorter
                step += share * float(coefficients @ features)
            times.append(job.steps * step)
        memory = max(float(self.memory @ np.array(_held(plan, window))) for window, _ in job.windows(plan))
        trained = sum(window.depth - window.first for window, _ in job.windows(plan))
        held = max(window.depth - window.first for window, _ in job.windows(plan))
        if job.keep_states:
            memory += STATE_BYTES * job.layer_parameters * (trained - held)
        seconds, cpu_seconds = times
        return Costs(seconds, cpu_seconds, GROWTH * (memory + (job.cache_bytes if plan.cached else 0)))


# What a step's time is made of: per row and layer below the window (in the weights' dtype, in half), per row and layer
# of the window (and what recomputing adds), per row, per micro-batch; per layer of the window, and the step itself.
ROWS = np.array([True, True, True, True, True, False, False, False])
MICRO_BATCHES = 5
BOTTOMS = np.array([True, True, False, False, False, False, False, False])


def _timed(plan: Plan, window: Window) -> list[float]:
    rows, layers = plan.micro_batch * plan.accumulation, window.depth - window.first
    bottom, trained = float(rows * window.first), float(rows * layers)
    by_dtype = [0.0, bottom] if plan.half else [bottom, 0.0]
    return [*by_dtype, trained, trained * plan.checkpointing, rows, plan.accumulation, layers, 1.0]


def _held(plan: Plan, window: Window) -> list[float]:
    """Return what memory is made of: the process; per layer, gradients and states; per row; per row and layer,
    activations, or what is left of them where they are recomputed; per row of one layer that is."""
    rows, layers = plan.micro_batch, window.depth - window.first
    kept = rows * layers
    return [1.0, layers, rows, kept * (not plan.checkpointing), kept * plan.checkpointing, rows * plan.checkpointing]


def _fit(features: np.ndarray, measured: Sequence[float]) -> np.ndarray:
    values = np.array(measured, dtype=float)
    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(features / scale / values[:, None], np.ones(len(values)))
    fitted: np.ndarray = found / scale
    return fitted


def possible_plans(job: Job) -> Iterator[Plan]:
    """Yield every plan of a job, those that train the most layers first."""
    largest = job.widest.depth - job.widest.first
    batches = [rows for rows in range(1, job.sequences + 1) if job.sequences % rows == 0]
    for window in (None, *range(largest - 1, 0, -1)):
        for rows in batches:
            for checkpointing in (False, True):
                plan = Plan(rows, job.sequences // rows, window, checkpointing, job.may_half)
                yield plan
                if job.may_cache and job.epochs > 1:
                    yield replace(plan, cached=True)


def probes_of(job: Job) -> list[tuple[Plan, Window]]:
    """Return the steps to measure: few and many layers, one and several rows, recomputed or not, a short bottom."""
    deepest = job.depths[-1]
    several = min(4, job.sequences)
    wide, narrow = job.widest, Window(deepest, deepest - 1)
    rows = sorted({1, several})
    found = [(Plan(each, 1, checkpointing=checkpointing, half=job.may_half), window)
             for checkpointing in (False, True) for window in (narrow, wide) for each in rows]  # fmt: skip
    if len(job.depths) > 1:
        shallow = Window(job.depths[0], job.depths[0] - 1)
        found.append((Plan(1, 1, half=job.may_half), shallow))
    found.append((Plan(1, min(4, job.sequences), half=job.may_half), narrow))
    # what a larger one leaves in the process would count for a smaller one behind it; the first is the least of all
    return sorted(found, key=lambda each: (sum(_held(*each)[2:5]), each[0].checkpointing, each[1].depth))


def fits(probes: Sequence[Probe], plan: Plan, window: Window, memory: float, before: float) -> bool:
    """Tell whether a step surely takes no more than a limit of memory, by those measured so far.

    What a step takes beyond what the process had before grows with its rows and its layers at most.

    Args:
        probes: Measured so far.
        plan: Of the step.
        window: That it trains.
        memory: Bytes, the limit.
        before: Bytes of the process before any step.
    """
    bounds = [memory] if not probes else []  # nothing is known yet
    for probe in probes:
        if plan.checkpointing or not probe.plan.checkpointing:
            layers = (window.depth - window.first) / (probe.window.depth - probe.window.first)
            larger = max(1.0, layers) * max(1.0, plan.micro_batch / probe.plan.micro_batch)
            bounds.append(before + (probe.memory - before) * larger)
    return before <= memory and min(bounds, default=memory) <= memory


def fitting(probes: Sequence[Probe], plan: Plan, window: Window, memory: float, before: float) -> tuple[Plan, Window]:
    """Return a step to measure that :func:`fits`: with fewer rows, then fewer layers, than asked for."""
    while not fits(probes, plan, window, memory, before):
        layers = window.depth - window.first
        if plan.micro_batch > 1:
            plan = replace(plan, micro_batch=plan.micro_batch // 2)
        elif layers > 1:
            window = Window(window.depth, window.depth - layers // 2)
        else:
            break  # the least there is
    return plan, window


def choose(model: CostModel, job: Job, memory: float | None, deadline: float | None) -> tuple[Plan, Costs]:
    """Return the plan that trains the most layers a step within the limits, and of those the fastest.

    Args:
        model: Of this machine.
        job: What is to be trained.
        memory: Bytes of the process, at most.
        deadline: Seconds, at most.

    Raises:
        BudgetError: If there is none; it names the least memory and the least time.
    """
    costed = [(plan, model.costs(plan, job)) for plan in possible_plans(job)]
    costed = [each for each in costed if model.covers(each[0], job)] or costed
    within = [each for each in costed if (memory is None or each[1].memory <= memory)
              and (deadline is None or each[1].seconds <= deadline)]  # fmt: skip
    if not within:
        leanest = min(costed, key=lambda each: each[1].memory)
        lean = [each for each in costed if memory is None or each[1].memory <= memory]
        told = (
            f"the least memory that would do is {leanest[1].memory / GIB:.2f} GiB: {leanest[0].in_words}"
            if not lean
            else f"within that memory the fastest takes {_minutes(min(each[1].seconds for each in lean))}"
        )
        asked = [f"{memory / GIB:.2f} GiB"] if memory is not None else []
        asked += [_minutes(deadline)] if deadline is not None else []
        raise BudgetError(f"no plan trains within {' and '.join(asked)}; {told}")
    largest = max(_trained(plan, job) for plan, _ in within)
    return min((each for each in within if _trained(each[0], job) == largest), key=lambda each: each[1].seconds)


def _trained(plan: Plan, job: Job) -> int:
    return sum(window.depth - window.first for window, _ in job.windows(plan))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
