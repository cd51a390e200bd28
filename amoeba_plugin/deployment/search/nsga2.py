"""NSGA-II (Deb et al. 2002), by Optuna: choices of shape and scheme evolve towards those that lose and cost least.

Optuna keeps every trial in a journal, a file: a search that was killed goes on from there, and several processes may
share one. What exceeds the budget is not evaluated, and loses against all that keeps it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.search.problem import Choice, Problem, best_kept
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.errors import ArtifactError, PluginError
from amoeba_plugin.shape import SubnetShape

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

SEED, POPULATION = 0, 20
WORST = 1e9  # the loss of what exceeds the budget, which is compared by how far it exceeds it
DEPTH, WIDTH, POINT = "depth", "width", "flow"  # parameters of a trial
QUALITY, EXCESS = "quality", "excess"  # what is kept of it


def nsga2(problem: Problem) -> Choice:
    """Return the best choice within the budget that was found in so many trials.

    Raises:
        ArtifactError: If the storage is no journal of trials.
        BudgetError: If there is none.
        PluginError: If Optuna is not installed.
    """
    optuna = _optuna()
    possible = problem.possible()
    with _quietly(optuna):
        study = _study(optuna, problem, possible)
        done = optuna.trial.TrialState.COMPLETE
        if len(study.get_trials(deepcopy=False, states=(done,))) < problem.trials:
            enough = optuna.study.MaxTrialsCallback(problem.trials, states=(done,))
            study.optimize(lambda trial: _tried(problem, study, trial), callbacks=[enough])
        trials = study.get_trials(deepcopy=False, states=(done,))
    _recall(problem, trials)
    return best_kept(problem, _judged(problem, trials))


def _tried(problem: Problem, study: Study, trial: Trial) -> list[float]:
    """Try one choice, and return its loss and costs."""
    space = problem.space
    depth = trial.suggest_int(DEPTH, 0, len(space.depths) - 1)
    width = trial.suggest_int(WIDTH, 0, len(space.widths) - 1)
    point = trial.suggest_categorical(POINT, [str(point) for point in problem.budget.points])
    choice = Choice(SubnetShape(space.depths[depth], space.widths[width]), Point.parse(point))
    keeps, loss = problem.keeps(choice), WORST
    if keeps:
        _recall(problem, study.get_trials(deepcopy=False))  # another process may have judged it
        loss = problem.loss(choice)
        trial.set_user_attr(QUALITY, _written(problem.qualities[choice.shape]))
    costs = problem.costs(choice)
    excess = [costs[limit].value / limit.most - 1 for limit in problem.budget.limits]
    trial.set_user_attr(EXCESS, [min(each, 0.0) if keeps else each for each in excess])
    return [loss, *(costs[limit].value for limit in problem.budget.limits)]


def _study(optuna: Any, problem: Problem, possible: list[Choice]) -> Study:
    storage, seed = None, SEED
    if problem.storage is not None:
        seed = os.getpid()  # processes that share it must not all try the same
        backend = optuna.storages.journal.JournalFileBackend(str(problem.storage))
        try:
            storage = optuna.storages.JournalStorage(backend)
        except Exception as error:  # of a file that is something else
            raise ArtifactError(
                f"{problem.storage} is no journal of trials, or damaged; name another file, or delete it"
            ) from error
    sampler = optuna.samplers.NSGAIISampler(
        population_size=POPULATION, seed=seed, constraints_func=lambda trial: trial.user_attrs.get(EXCESS, [WORST])
    )
    directions = ["minimize"] * (1 + len(problem.budget.limits))
    study: Study = optuna.create_study(
        storage=storage, sampler=sampler, study_name=problem.name, directions=directions, load_if_exists=True
    )
    if not study.get_trials(deepcopy=False):
        for point in problem.budget.points:  # both ends of every scheme: so that there is something that keeps it
            ends = [choice for choice in possible if choice.point == point]
            for choice in ends[:1] + ends[1:][-1:]:
                study.enqueue_trial(_parameters(problem, choice))
    return study


def _parameters(problem: Problem, choice: Choice) -> dict[str, Any]:
    depth, width = problem.space.depths.index(choice.shape.depth), problem.space.widths.index(choice.shape.width)
    return {DEPTH: depth, WIDTH: width, POINT: str(choice.point)}


def _choice(problem: Problem, trial: FrozenTrial) -> Choice:
    depth, width = problem.space.depths[trial.params[DEPTH]], problem.space.widths[trial.params[WIDTH]]
    return Choice(SubnetShape(depth, width), Point.parse(trial.params[POINT]))


def _judged(problem: Problem, trials: list[FrozenTrial]) -> list[Choice]:
    return list(dict.fromkeys(_choice(problem, trial) for trial in trials if QUALITY in trial.user_attrs))


def _recall(problem: Problem, trials: list[FrozenTrial]) -> None:
    """Take over what was judged before, or by another process."""
    for trial in trials:
        if QUALITY in trial.user_attrs:
            shape = _choice(problem, trial).shape
            if shape not in problem.qualities:
                problem.qualities[shape] = _read(trial.user_attrs[QUALITY])


def _written(quality: Quality) -> dict[str, Any]:
    return {
        "value": quality.value, "low": quality.low, "high": quality.high,
        "samples": [[list(unit) for unit in sample] for sample in quality.samples],
    }  # fmt: skip


def _read(written: dict[str, Any]) -> Quality:
    samples = tuple(tuple((above, below) for above, below in sample) for sample in written["samples"])
    return Quality(written["value"], written["low"], written["high"], samples)


@contextmanager
def _quietly(optuna: Any) -> Iterator[None]:
    """Keep Optuna's progress and its warnings of what is new in it from the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", module="optuna")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _optuna() -> Any:
    if find_spec("optuna") is None:
        raise PluginError("the searcher nsga2 needs Optuna: pip install 'amoeba-plugin[search]'")
    import optuna

    return optuna
