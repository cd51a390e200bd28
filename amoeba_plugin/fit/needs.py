"""What a fit needs of this machine: that of its recipe, and of the steps around it; and whether its disks have it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.recipes.disk import KEPT, TEXTS, DiskNeed, Phase, around, exact, exported
from amoeba_plugin.recipes.model_plan import ModelPlan
from amoeba_plugin.recipes.needs import Needs, recipe_needs
from amoeba_plugin.recipes.plan import RecipePlan
from amoeba_plugin.runtime.free_space import one_disk, require_free
from amoeba_plugin.shape import SubnetShape

COPIES = 2  # of text: its parts, and what the data sets library keeps of a file that it read
ADVICE = "free space, name another directory, or set TMPDIR for what is there for a while; nothing was written"


def fit_needs(
    plan: RecipePlan, model_plan: ModelPlan, budget: Budget, subject: Subject | None, rows: tuple[int, int], text: int,
    possible: Iterable[SubnetShape] = (),
) -> Needs:  # fmt: skip
    """Return what a fit needs.

    Args:
        plan: Of its recipe.
        model_plan: The same, against the model's configuration.
        budget: That shall be kept.
        subject: What is profiled; ``None``: nothing is.
        rows: Sequences that selection sees, and tokens of each.
        text: Bytes of the data set.
        possible: Shapes of which one will be taken; none: nothing is known of what they cost.
    """
    needs = recipe_needs(plan, model_plan, *rows, subject, possible)
    assert needs is not None  # the recipe of a fit selects and cuts
    texts = Phase({"the text": COPIES * text + TEXTS})
    disk = DiskNeed([texts, *_without_steps(needs.disk), _deployment(needs, budget)])
    # a profile's models are random, of single precision, and there before the model itself is
    stages = {**needs.memory.stages, "the profile": max(0, 4 * needs.weights.whole - needs.memory.model)}
    return replace(needs, disk=disk, memory=replace(needs.memory, stages=stages))


def require_disk(need: DiskNeed, output: Path) -> None:
    """Refuse to start where a disk has not the room; what an earlier run left in the directory counts as room.

    Raises:
        ArtifactError: With what is needed and what is free.
    """
    temporary = Path(tempfile.gettempdir())
    there = bytes_in(output)
    if one_disk(output, temporary):
        require_free({output: need.together - there}, ADVICE)
    else:
        require_free({output: need.output - there, temporary: need.temporary}, ADVICE)


def bytes_in(path: Path) -> int:
    """Return the bytes of a file, or of all files of a directory; 0 where there is neither."""
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return sum(each.lstat().st_size for each in files if each.is_file())


def _without_steps(disk: DiskNeed) -> Iterator[Phase]:
    """Yield the phases of a recipe behind which the steps of its selection are deleted."""
    kept = disk.written.get(KEPT, 0)
    for phase in disk.phases:
        written = {name: count for name, count in phase.written.items() if name != KEPT}
        yield replace(phase, written=written, meanwhile=phase.meanwhile + kept)


def _deployment(needs: Needs, budget: Budget) -> Phase:
    """Of the file, the checkpoint it is made of, and for a lossy scheme the same of the whole model."""
    weights, stored = needs.weights, needs.sizes.stored
    file_limit = min((limit.most for limit in budget.limits if limit.kind == "file"), default=float("inf"))
    written, meanwhile, temporary = 0, 0, 0
    for point in budget.points:
        size, made = exported(weights, point, needs.subnet)
        checkpoint = needs.subnet * stored + around(weights)
        whole = 0
        if not exact(point):
            whole = weights.whole * stored + sum(exported(weights, point, weights.whole)) + around(weights)
        written = max(written, round(min(size, file_limit)) + TEXTS)
        meanwhile, temporary = max(meanwhile, made), max(temporary, checkpoint + whole)
    return Phase({"what is deployed": written}, meanwhile, temporary)
