"""A run that is killed, wherever, and given again ends with the bytes of one that was not; nothing is left behind."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from support.bases import save_with_text
from support.killed_runs import start

TinyModel = Callable[..., PreTrainedModel]
RECIPE = """
select_stage:
  a_modifiers:
    DepthShrinkingModifier: {min_depth: 2, resume_dir: WORK/scores}
    WidthShrinkingModifier: {widths: ["1", "1/2"], resume_dir: WORK/steps}
finetune_stage:
  b_modifiers:
    OneForAllDistillationModifier:
      {adapter: {r: 2, num_experts: 2, router_noise: true}, max_steps: 3, batch_size: 3, gradient_accumulation_steps: 1,
       learning_rate: 0.01, checkpoint_dir: WORK/checkpoints, save_steps: 1, elastic_dir: WORK/elastic}
extract_stage:
  c_modifiers:
    SubnetExtractionModifier: {shape: 3x1/2}
quantize_stage:
  d_modifiers:
    QuantizationModifier: {targets: [Linear], scheme: W8A8, ignore: [lm_head]}
"""
RESULTS = ("out/model.safetensors", "elastic/adapter/adapter_model.safetensors", "elastic/strategy.json")
LEFT = {"recipe.yaml", "scores", "steps", "checkpoints", "elastic", "out"}


@pytest.fixture
def base(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A model with a tokenizer and a text."""
    return save_with_text(tiny_model("llama"), tmp_path / "base")


def workplace(directory: Path) -> Path:
    directory.mkdir()
    (directory / "recipe.yaml").write_text(RECIPE.replace("WORK", str(directory)))
    return directory


def results(work: Path) -> dict[str, bytes]:
    """Of the strategy all but the seconds it took."""
    found = {name: (work / name).read_bytes() for name in RESULTS}
    strategy = json.loads(found[RESULTS[-1]])
    del strategy["provenance"], strategy["depth"]["search"]
    return found | {RESULTS[-1]: json.dumps(strategy).encode()}


def require_recovers(base: Path, work: Path, expected: dict[str, bytes], **killed: float) -> None:
    start(workplace(work), base, **killed)
    start(work, base)
    assert results(work) == expected, killed
    assert {path.name for path in work.iterdir()} == LEFT, killed
    rest = [path.name for path in work.rglob("*") if path.name.endswith((".partial", ".lock", ".filling"))]
    assert not rest, killed


def test_a_run_killed_between_two_files_ends_as_one_that_was_not(base: Path, tmp_path: Path) -> None:
    changes = start(workplace(tmp_path / "whole"), base)
    expected = results(tmp_path / "whole")
    assert changes > 50
    # while it selects, while it trains, in the elastic checkpoint, at the end
    for number in (2 * changes // 5, 3 * changes // 5, changes - 30, changes - 3):
        require_recovers(base, tmp_path / str(number), expected, before=number)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_killed_anywhere_ends_as_one_that_was_not(base: Path, tmp_path: Path) -> None:
    """Before every change of a file, and at 100 moments drawn at random."""
    begun = time.perf_counter()
    changes = start(workplace(tmp_path / "whole"), base)
    seconds, expected, draw = time.perf_counter() - begun, results(tmp_path / "whole"), random.Random(0)
    for number in range(changes):
        require_recovers(base, tmp_path / str(number), expected, before=number)
    for number in range(100):
        require_recovers(base, tmp_path / f"random{number}", expected, seconds=draw.uniform(0, seconds))
