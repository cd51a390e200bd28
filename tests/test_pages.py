"""The Python of the pages runs as it is printed, one block after another, on models and schedules made small."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from transformers import PreTrainedModel

from amoeba_plugin.recipes.files import shipped_recipes

ROOT = Path(__file__).parent.parent
TinyModel = Callable[..., PreTrainedModel]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(program: str, directory: Path, **changes: str) -> None:
    for old, new in changes.items():
        assert old in program, f"{old} is printed no more"
        program = program.replace(old, new)
    done = subprocess.run([sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def save_qwen3(tiny_model: TinyModel, directory: Path) -> None:
    tiny_model("qwen3", layers=28).save_pretrained(directory / "Qwen3")  # as many layers as the 0.6B model


def test_readme(tmp_path: Path, tiny_model: TinyModel):
    recipe = yaml.safe_load(shipped_recipes()["demo"].read_text())
    recipe["finetune_stage"]["amoeba_finetune_modifiers"]["OneForAllDistillationModifier"]["max_steps"] = 1
    recipe["select_stage"]["amoeba_depth_modifiers"]["DepthShrinkingModifier"]["exchanges"] = 0
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    save_qwen3(tiny_model, tmp_path)
    program, smol, *training = blocks("README.md")
    four_bit = [block for block in training if "BitsAndBytesConfig" in block]
    assert len(four_bit) == 1
    if importlib.util.find_spec("bitsandbytes") is None:
        training.remove(four_bit[0])
    small = {"block_size=256, limit=64": "block_size=32, limit=8", "max_steps=100": "max_steps=1"}
    run(program + "".join(training), tmp_path, **small)
    assert (tmp_path / "subnet" / "config.json").is_file()
    assert (tmp_path / "trained" / "elastic.json").is_file()
    run(smol, tmp_path, **{"Qwen/Qwen3-0.6B": "Qwen3"})


def test_the_page_of_smol(tmp_path: Path, tiny_model: TinyModel):
    save_qwen3(tiny_model, tmp_path)
    run("".join(blocks("amoeba_plugin/smol/README.md")), tmp_path, **{"Qwen/Qwen3-0.6B": "Qwen3"})
    assert (tmp_path / "lora-24x7_8" / "adapter_config.json").is_file()
