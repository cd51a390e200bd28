"""The end of the demo: the best subnets within budgets of this machine, deployed, and proved by their engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from amoeba_plugin.demo.data import JUDGED_BLOCKS, Schedule
from amoeba_plugin.deployment.budget import Budget, Limit
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.asked import flows_of, prompts_of, subject_of
from amoeba_plugin.deployment.profiling.cost_model import cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.run import ShapeSearch
from amoeba_plugin.deployment.within import deploy_best
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.errors import BudgetError, DeploymentError, PluginError
from amoeba_plugin.reports.report import BudgetRow, DeployedRow
from amoeba_plugin.shape import ShapeSpace

POINTS = ("torch:fp32", "llama-cpp:Q4_0")
ELASTIC = "torch:elastic"  # what answers requests
SHARE = 0.7  # of the whole model's time to the first token, which a budget allows,
ROOM = 1.02  # or this much more than the smallest shape takes, where that is more
FINALISTS = 2


def within_budgets(elastic: Path, judged: Path, output: Path, schedule: Schedule) -> tuple[list[BudgetRow], Profile]:
    """Profile shapes, search the best one within a budget of every engine that is there, and deploy it.

    The budget is about the longest prompt: decoding hardly tells shapes of a model this small apart.

    Args:
        elastic: The elastic checkpoint.
        judged: Blocks of text that shapes are judged on.
        output: Where ``profile.json``, and for every engine what was found and ``deployed-ENGINE/`` are written.
        schedule: How much is measured.
    """
    live, _ = load_elastic(elastic)
    subject = subject_of(str(elastic), None, [], [])
    path, decoded = output / "profile.json", Measuring().decoded
    lengths = prompts_of([], subject, decoded)
    how = Measuring(lengths, decoded, schedule.profile_rounds, shapes=schedule.profile_shapes)
    profile_model(subject, flows_of([*_runnable(), ELASTIC]), path, how, "the demo's model")
    asked = Asked(
        "hierarchical", str(judged), num_samples=JUDGED_BLOCKS, measure=schedule.measures, finalists=FINALISTS
    )  # fmt: skip
    search = ShapeSearch(live, path, asked, name=str(elastic))
    rows = []
    for point in _runnable():
        engine = Point.parse(point).flow
        try:
            found = search.within(_budget(Profile.load(path), point, live.space))
        except BudgetError as error:  # the machine has become slower than when it was profiled: the rest holds
            tqdm.write(f"no subnet for {point} in this report: {error}")
            continue
        found.save(output / f"frontier-{engine}.json")
        directory = output / f"deployed-{engine}"
        try:
            best = deploy_best(elastic, found, directory)
        except DeploymentError as error:
            tqdm.write(f"no subnet for {point} in this report: {error}")
            continue
        deployed = best.deployed
        row = DeployedRow(
            shape=best.choice.shape, flow=point, bytes=deployed.export.bytes, parity=deployed.parity.in_words,
            directory=str(directory), ways=deployed.ways, skipped=best.skipped,
        )  # fmt: skip
        rows.append(BudgetRow(frontier=found, deployed=row))
    return rows, Profile.load(path)


def _runnable() -> Iterator[str]:
    """Yield the points whose engines are installed."""
    for each in POINTS:
        with suppress(DeploymentError, PluginError):
            flow, _ = point_named(each)
            flow.command()
            yield each


def _budget(profile: Profile, point: str, space: ShapeSpace) -> Budget:
    """Return a budget that allows a share of what the whole model takes, and that a shape keeps by the profile."""
    of = profile.flows[point]
    model, works = cost_models(of)["prefill"], profile.works
    whole, *others = (model.predict(works[str(shape)], of.longest).value for shape in space)
    most = max(SHARE * whole, ROOM * min(others))
    return Budget.parse(f"{point} {Limit('prefill', float(f'{most:.3g}'), of.longest)}")
