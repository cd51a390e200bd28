"""What layer tuning saves gives the same logits in another process; a killed training ends with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.errors import ArtifactError, ShapeError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.files import load_tuned, save_exit
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.trainer import AdaptiveLayerTuningTrainer
from support.batches import make_rows
from support.models import require_close, save_base, tiny_llama
from support.training import make_arguments, parameters_of

TESTS = Path(__file__).parents[2]
TOKENS = torch.arange(3, 15)[None]


def make(directory: Path, kind: str, output: Path, **fields: Any) -> AdaptiveLayerTuningTrainer:
    """Return a trainer of a saved base: "none", "lora" or "smol"."""
    base = directory / "base"
    if not base.is_dir():
        save_base(tiny_llama(vocab_size=97), base)
    exits = Exits(AutoModelForCausalLM.from_pretrained(base), [1, 3, 4], kind == "none" or kind.endswith("stacked"))
    torch.manual_seed(0)
    targets, saved, model = ["q_proj", "down_proj"], exits.modules_to_save, exits.model
    if kind.startswith("lora"):
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=saved, lora_dropout=0.1)
        model = get_peft_model(exits.model, config)
    if kind == "smol":
        model = get_peft_model(
            exits.model, SmolConfig(r=2, num_experts=2, target_modules=targets, modules_to_save=saved)
        )
    names = LayerTuningOptions.__dataclass_fields__
    options = LayerTuningOptions(**{name: fields.pop(name) for name in list(fields) if name in names})
    return AdaptiveLayerTuningTrainer(
        model, exits, options, args=make_arguments(output, **fields), train_dataset=make_rows(),
        data_collator=PaddingCollator(),
    )  # fmt: skip


@torch.no_grad()
def exit_logits(trainer: AdaptiveLayerTuningTrainer) -> dict[str, torch.Tensor]:
    trainer.model.eval()
    found = {}
    for depth in trainer.exits.depths:
        with trainer.exits.active(depth):
            found[str(depth)] = trainer.model(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", ["none", "lora", "lora stacked", "smol"])
def test_exits_are_the_same_in_another_process(kind: str, tmp_path: Path):
    trainer = make(tmp_path, kind, tmp_path / "training", policy="cyclic", max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    expected = exit_logits(trainer)
    subprocess.run(
        [sys.executable, "-m", "support.reload_tuned", tmp_path / "tuned", tmp_path / "found.safetensors"],
        check=True, cwd=TESTS,
    )  # fmt: skip
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys()
    for depth, value in expected.items():
        require_close(found[depth], value)
    assert not torch.allclose(expected["1"], expected["3"])


def test_a_tuned_model_without_its_exits_is_the_deepest_one(tmp_path: Path):
    trainer = make(tmp_path, "none", tmp_path / "training", policy="cyclic", max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        require_close(plain(TOKENS).logits, exit_logits(trainer)["4"])


@pytest.mark.parametrize("kind", ["none", "lora", "lora stacked", "smol"])
def test_an_exit_becomes_an_ordinary_checkpoint(kind: str, tmp_path: Path):
    trainer = make(tmp_path, kind, tmp_path / "training", policy="cyclic", max_steps=4)
    trainer.train()
    expected, before = exit_logits(trainer), parameters_of(trainer.model)
    save_exit(trainer.model, trainer.exits, 3, tmp_path / "exit")
    extract_checkpoint(tmp_path / "exit", "3x1", tmp_path / "subnet")
    subnet = AutoModelForCausalLM.from_pretrained(tmp_path / "subnet")
    assert subnet.config.num_hidden_layers == 3
    with torch.no_grad():
        require_close(subnet(TOKENS).logits, expected["3"])
    assert not {name for name in load_file(tmp_path / "subnet" / "model.safetensors") if "exit" in name}
    assert "exit_depths" not in json.loads((tmp_path / "subnet" / "config.json").read_text())
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(trainer.model).items())
    with pytest.raises(ShapeError, match="no exit at 2; there are 1, 3, 4"):
        save_exit(trainer.model, trainer.exits, 2, tmp_path / "other")


class Killed(Exception):
    pass


class Interruption(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if args[1].global_step == 3:
            raise Killed


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("none", {"policy": "random"}),
        ("lora", {"policy": "random", "phase_steps": 2}),
        ("smol", {"policy": "cyclic"}),
        ("none", {"policy": "sequential", "keep_states": False}),
        ("lora stacked", {"policy": "sequential", "cache_gib": 0.1}),
        ("lora", {"policy": "random", "cache_gib": 0.1}),
    ],
)
def test_a_killed_training_ends_bit_equal_to_one_that_was_not(kind: str, options: dict[str, Any], tmp_path: Path):
    how = options | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "seed": 5}
    whole = make(tmp_path, kind, tmp_path / "whole", **how)
    whole.train()
    killed = make(tmp_path, kind, tmp_path / "killed", **how)
    killed.add_callback(Interruption())
    with pytest.raises(Killed):
        killed.train()
    again = make(tmp_path, kind, tmp_path / "killed", **how)
    again.train(resume_from_checkpoint=True)
    expected = parameters_of(whole.model)
    assert again.state.global_step == 6
    assert {
        name for name, value in parameters_of(again.model).items() if not torch.equal(value, expected[name])
    } == set()


def test_damaged_files_are_refused(tmp_path: Path):
    trainer = make(tmp_path, "none", tmp_path / "training", max_steps=1)
    trainer.save_model(str(tmp_path / "tuned"))
    path = tmp_path / "tuned" / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "exit_norms.3" not in name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ArtifactError, match="lacks the norms of its exits"):
        load_tuned(tmp_path / "tuned")
    path.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="holds no tuned model, or is damaged"):
        load_tuned(tmp_path / "tuned")
    with pytest.raises(ArtifactError, match="holds no tuned model"):
        load_tuned(tmp_path / "none")
