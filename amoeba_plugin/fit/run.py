"""``amoeba fit``: profile, write the recipe, run it, deploy what it chose, and say how good that is.

Every step leaves a result that is whole or not there, so that a run which was killed goes on by being started again;
a profile, a selection and a training go on from what they had.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from amoeba_plugin.data.text import require_file
from amoeba_plugin.deployment.budget import Budget, Limit
from amoeba_plugin.deployment.loads import require_loads
from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.rules import engine_rules
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.evaluators import loss
from amoeba_plugin.deployment.search.frontier import Frontier, Interval
from amoeba_plugin.deployment.search.preflight import profile_for, require_possible
from amoeba_plugin.deployment.within import deploy_best
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.errors import ArtifactError, BudgetError, DeploymentError
from amoeba_plugin.fit.data import JUDGE, REPORT, TRAIN, part_text
from amoeba_plugin.fit.needs import bytes_in, fit_needs, require_disk
from amoeba_plugin.fit.page import write_page
from amoeba_plugin.fit.recipe import fit_recipes, smallest_space
from amoeba_plugin.fit.result import Deployment, FitOptions, Fitted, Request
from amoeba_plugin.recipes.budgeted import expected_works
from amoeba_plugin.recipes.check import check_recipe
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.needs import Needs
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.recipes.run import run_recipe
from amoeba_plugin.runtime.files import is_vacant, write_atomically
from amoeba_plugin.runtime.model_files import load_config, load_tokenizer
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.runtime.stages import Stages
from amoeba_plugin.shape import SubnetShape

ASKED, DEPLOYED, RESULT, RECIPE = "asked.json", "deployed.json", "fit.json", "recipe.yaml"
TRAINED_ON, SAVE_STEPS = 2000, 50  # rows, and steps between two checkpoints of the training


@dataclass(frozen=True)
class Planned:
    """What a fit will do.

    Attributes:
        recipe: Written, and not run.
        told: What its stages cost, what the budget leaves, and what it needs of memory and disk, in sentences.
        needs: The last two, in bytes.
    """

    recipe: Path
    told: list[str]
    needs: Needs


class _Fit:
    """One fit: where everything lies, and how long steps took."""

    def __init__(self, model: str, dataset: str, budget: Budget, output: Path, options: FitOptions) -> None:
        self.model, self.dataset, self.budget, self.output, self.options = model, dataset, budget, output, options
        self.stages = Stages()
        self.elastic, self.frontier = output / "elastic", output / "frontier.json"
        self.profile, self.deployed = output / "profile.json", output / "deployed"
        self.selection = output / "selection"
        self.possible: list[SubnetShape] = []  # shapes that may keep the budget, once that is known

    def require_room(self) -> None:
        """Refuse before anything is written where a disk has not the room, whichever shape will be best.

        Raises:
            ArtifactError: With what is needed and what is free.
        """
        data = {name: self.output / "data" / name for name in (TRAIN, JUDGE, REPORT)}
        for text in fit_recipes(self._values(data), self.budget):
            require_disk(self._needs(text, measured=self.profile.exists()).disk, self.output)

    def needs(self) -> Needs:
        """Return what the recipe that was prepared needs, and what the steps around it do."""
        return self._needs((self.output / RECIPE).read_text(encoding="utf-8"), measured=True)

    def _needs(self, text: str, measured: bool) -> Needs:
        plan, config = plan_recipe(text), load_config(self.model)
        subject = None if measured else subject_of(self.model, None, *smallest_space(config.num_hidden_layers))
        rows = (self.options.num_samples, self.options.max_seq_length)
        size = bytes_in(Path(self.dataset))
        return fit_needs(plan, plan.against(config), self.budget, subject, rows, size, self.possible)

    def prepare(self) -> Path:
        """Part the text, profile the model, and write the recipe that will run."""
        with self.stages.timed("text"):
            data = part_text(self.dataset, self.options.split, self.options.text_column, self.output / "data")
        config, works = load_config(self.model), {}
        for text in fit_recipes(self._values(data), self.budget):
            plan = plan_recipe(text)  # refuses what does not fit the model, before anything is measured
            works[text] = expected_works(plan, plan.against(config))
        with self.stages.timed("profile"):
            subject = subject_of(self.model, None, *smallest_space(config.num_hidden_layers))
            profile = profile_for(self.budget, subject, self.profile, self.model)
        text = self._first_possible(works, profile)
        path = self.output / RECIPE
        command = ["amoeba", "run", path, "--model", self.model, "--dataset", self.output / "data" / TRAIN,
                   "--num-calibration-samples", self.options.num_samples, "--max-seq-length",
                   self.options.max_seq_length, "--seed", self.options.seed, "--output-dir", "OTHER"]  # fmt: skip
        again = f"# The same subnet again:\n#   {shlex.join(map(str, command))}\n\n"
        write_atomically(path, (again + text).encode())
        return path

    def _first_possible(self, works: Mapping[str, Mapping[SubnetShape, Work]], profile: Profile) -> str:
        """Return the first recipe of which a shape may keep the budget, and its engines hold the largest of those."""
        *others, last = works
        for text in others:
            with suppress(BudgetError):
                return self._held(text, require_possible(self.budget, profile, works[text]))
        return self._held(last, require_possible(self.budget, profile, works[last]))

    def _held(self, text: str, possible: list[SubnetShape]) -> str:
        for point in self.budget.points:
            if point.flow in engine_rules():
                require_loads(str(possible[0]), self.model, str(point))
        self.possible = possible
        return text

    def _values(self, data: dict[str, Path]) -> dict[str, object]:
        tokens = self.options.max_seq_length
        train, extract = "OneForAllDistillationModifier", "SubnetExtractionModifier"
        values: dict[str, object] = {
            f"{train}.dataset": str(data[TRAIN]), f"{train}.max_seq_length": tokens, f"{train}.seed": self.options.seed,
            f"{train}.elastic_dir": str(self.elastic), f"{train}.num_samples": TRAINED_ON,
            f"{extract}.profile": str(self.profile), f"{extract}.dataset": str(data[JUDGE]),
            f"{extract}.frontier": str(self.frontier),
            **{f"{each}ShrinkingModifier.resume_dir": str(self.selection) for each in ("Depth", "Width")},
        }  # fmt: skip
        if self.options.steps == 0:
            return values | {f"{train}.max_steps": 0}
        steps = {} if self.options.steps is None else {f"{train}.max_steps": self.options.steps}
        checkpoints = {f"{train}.checkpoint_dir": str(self.output / "checkpoints"), f"{train}.save_steps": SAVE_STEPS}
        return values | steps | checkpoints

    def run(self, recipe: Path) -> None:
        """Select, train, search and cut, by the recipe alone."""
        options = RunOptions(
            num_samples=self.options.num_samples, max_seq_length=self.options.max_seq_length, seed=self.options.seed,
            text_column=self.options.text_column,
        )  # fmt: skip
        with self.stages.timed("recipe"):
            run_recipe(str(recipe), self.model, str(self.output / "data" / TRAIN), self.output / "subnet", options)
        shutil.rmtree(self.selection, ignore_errors=True)  # what a killed run goes on from; the checkpoints hold it now

    def deploy(self) -> Deployment:
        """Deploy the best choice that its engine holds."""
        done = self.output / DEPLOYED
        if done.is_file():
            return Deployment.load(done)
        with self.stages.timed("deploy"):
            best = deploy_best(self.elastic, Frontier.load(self.frontier), self.deployed)
        each, made = best.choice, best.deployed
        told = Deployment(
            shape=each.shape, flow=each.flow, parity=made.parity.in_words, mean_kl=made.parity.mean_kl,
            costs={limit.name: _cost(limit, each.costs[limit.name].value) for limit in self.budget.limits},
            skipped=best.skipped, bytes=made.export.bytes, ways=made.ways,
        )  # fmt: skip
        told.save(done)
        return told

    def report(self, shape: str) -> tuple[Interval, Interval]:
        """Return the loss of the whole model and of a shape, on text that nothing else saw."""
        with self.stages.timed("report"):
            live, _ = load_elastic(self.elastic)
            asked = Asked("", str(self.output / "data" / REPORT), max_seq_length=self.options.max_seq_length)
            judge = loss(live, load_tokenizer(self.model), asked)
            whole, chosen = (judge.judge(live.space.require(each)) for each in (live.space.largest, shape))
        return Interval.of(whole), Interval.of(chosen)


def plan_fit(model: str, dataset: str, budget: str, output: Path, options: FitOptions | None = None) -> Planned:
    """Write the recipe that a fit will run, and say what it will cost; errors are those of :func:`fit_model`."""
    fit = _begun(model, dataset, budget, output, options or FitOptions())
    with owning(output / RESULT):
        recipe = fit.prepare()
        needs = fit.needs()
    told = check_recipe(str(recipe), model, fit.options.num_samples, fit.options.max_seq_length).costs
    return Planned(recipe, [*told, *needs.in_words], needs)


def fit_model(model: str, dataset: str, budget: str, output: Path, options: FitOptions | None = None) -> Fitted:
    """Make of a model what its budget of this machine allows: the best subnet, deployed for the budget's engine.

    Args:
        model: Path or hub id of a causal LM.
        dataset: Text: what it is selected and trained on, judged and reported on, in parts.
        budget: As it is written.
        output: New, or an earlier call's with the same arguments, which goes on. Holds in the end ``recipe.yaml``,
            ``profile.json``, ``frontier.json``, ``elastic/``, ``subnet/``, ``deployed/``, ``report.html`` and
            ``fit.json``.
        options: How it is made.

    Raises:
        AmoebaError: If the budget is none or no shape can keep it, the engine is missing or cannot hold the model, the
            text cannot be read, the directory holds something else, or a disk has not the room: then nothing is
            written.
    """
    fit = _begun(model, dataset, budget, output, options or FitOptions())
    with owning(output / RESULT):
        if (output / RESULT).is_file():
            return Fitted.load(output / RESULT)
        recipe = fit.prepare()
        fit.run(recipe)
        deployed = fit.deploy()
        whole, chosen = fit.report(deployed.shape)
        result = Fitted(
            model=model, budget=str(fit.budget), deployed=deployed, whole=whole, loss=chosen,
            seconds=fit.stages.seconds,
        )  # fmt: skip
        write_page(result, Frontier.load(fit.frontier), Profile.load(fit.profile), output)
        result.save(output / RESULT)
    return result


def _begun(model: str, dataset: str, budget: str, output: Path, options: FitOptions) -> _Fit:
    """Return a fit whose directory is its own."""
    limits = Budget.parse(budget)
    for point in limits.points:
        flow, _ = point_named(str(point))
        flow.command()  # refuses where the engine is missing
        if flow.runs_elastic(point.scheme):
            raise DeploymentError(f"{point} runs the elastic checkpoint as it is, and nothing is deployed to it")
    require_file(dataset)
    load_config(model)
    asked, record = Request(model=model, dataset=dataset, budget=str(limits), options=options), output / ASKED
    if record.is_file():
        other = asked.differs_from(Request.load(record))
        if other:
            raise ArtifactError(
                f"{output} is of another fit ({', '.join(other)}); name another directory, or empty this one"
            )
    elif not is_vacant(output):
        raise ArtifactError(f"{output} exists and is not empty; nothing is overwritten: name another directory")
    fit = _Fit(model, dataset, limits, output, options)
    if not (output / RESULT).is_file():
        fit.require_room()
    output.mkdir(parents=True, exist_ok=True)
    asked.save(record)
    return fit


def _cost(limit: Limit, value: float) -> str:
    return f"{limit.in_unit(value)} of {limit.in_unit(limit.most)}"
