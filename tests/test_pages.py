"""The Python of every page runs as it is printed, one block after another, on models and schedules made small."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel

from amoeba_plugin.deployment.profiling.profile import (
    FlowProfile,
    Profile,
    Round,
    Seconds,
    ShapeCost,
    config_digest,
    this_machine,
)
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.recipes.files import shipped_recipes
from support.elastic_files import write_elastic

ROOT = Path(__file__).parent.parent
SKIPPED = {".git", ".venv", "amoeba_demo", "build", "dist", "node_modules"}
TinyModel = Callable[..., PreTrainedModel]

# What is printed at a size for people, and the size that it runs at here.
SMALL = {
    "block_size=256, limit=64": "block_size=32, limit=8",
    "max_steps=100": "max_steps=1",
    "Qwen/Qwen3-0.6B": "Qwen3",
}
NEEDS = {"BitsAndBytesConfig": "bitsandbytes"}  # a block with this word is left out where that is not installed
LEAVES = {
    "README.md": ["subnet/config.json"],
    "amoeba_plugin/smol/README.md": [f"{each}/adapter_config.json" for each in ("smol", "lora-24x7_8", "lora-28x1")],
    "amoeba_plugin/training/README.md": ["elastic/elastic.json", "trained/elastic.json", "subnet/config.json"],
}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def pages() -> list[str]:
    """Every page with a block; those of a checkout that git knows."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    else:
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
        names = [path.as_posix() for path in found if not SKIPPED.intersection(path.parts)]
    return sorted(name for name in names if blocks(name))


def installed(block: str) -> bool:
    return all(importlib.util.find_spec(name) for word, name in NEEDS.items() if word in block)


@pytest.fixture
def scratch(tmp_path: Path, tiny_model: TinyModel) -> Path:
    """A directory with the demo's recipe on a short schedule, and a model with as many layers as Qwen3-0.6B."""
    recipe = yaml.safe_load(shipped_recipes()["demo"].read_text())
    recipe["finetune_stage"]["amoeba_finetune_modifiers"]["OneForAllDistillationModifier"]["max_steps"] = 1
    recipe["select_stage"]["amoeba_depth_modifiers"]["DepthShrinkingModifier"]["exchanges"] = 0
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    tiny_model("qwen3", layers=28).save_pretrained(tmp_path / "Qwen3")
    return tmp_path


def profile_of(live: ElasticModel) -> Profile:
    """Return a profile of the shapes of an elastic model on this machine, whose times are made up."""
    subject = Subject.of(live.config, live.space, live.strategy)
    sizes = {str(shape): astuple(Work.of(subject.sizes(shape))) for shape in live.space}

    def visit(size: float) -> Round:
        took = Seconds(wall=size * 1e-6, cpu=size * 1e-6)
        return Round(load=took, prefill={8: took, 32: took}, decode=took, peak=1)

    shapes = {name: ShapeCost(work=work, bytes=1, rounds=[visit(sum(work))]) for name, work in sizes.items()}
    flow = FlowProfile(engine={}, threads=1, batch=1, decoded=4, shapes=shapes)
    return Profile(
        model="random", digest=config_digest(live.config), sizes=sizes, machine=this_machine(),
        flows={"torch:elastic": flow},
    )  # fmt: skip


@pytest.mark.parametrize("page", pages())
def test_a_page_runs_from_its_first_block_to_its_last(page: str, scratch: Path):
    program = "".join(block for block in blocks(page) if installed(block))
    if "profile.json" in program:
        profile_of(write_elastic(scratch)).save(scratch / "profile.json")
    for printed, small in SMALL.items():
        program = program.replace(printed, small)
    done = subprocess.run([sys.executable, "-c", program], cwd=scratch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [name for name in LEAVES.get(page, []) if not (scratch / name).is_file()] == []


def test_every_page_that_shall_run_is_found_and_every_size_is_printed():
    found = pages()
    assert set(LEAVES) <= set(found)
    printed = "".join(block for page in found for block in blocks(page))
    assert [word for word in (*SMALL, *NEEDS) if word not in printed] == []
