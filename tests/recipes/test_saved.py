"""What is computed in one dtype and saved in another: subnets, quantized ones, a trained base, what is cut later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.run import run_recipe
from support.batches import token_dataset
from support.models import logits, make_tiny_model, save_base
from support.recipes import GIVEN_DEPTHS, QUANTIZATION, TRAIN_FIELDS, recipe

SHAPE = {"SubnetExtractionModifier": {"shape": "3x1/2"}}


def bases(directory: Path) -> tuple[Path, Path]:
    """Return a base in bf16, and one with the same values in float32."""
    model = make_tiny_model("llama").bfloat16()
    half = save_base(model, directory / "half")
    return half, save_base(model.float(), directory / "whole")


def run(
    base: Path,
    output: Path,
    *more: dict[str, Any],
    dtype: str = "float32",
    depth: dict[str, Any] | None = None,
    **training: Any,
) -> Path:
    """Run a recipe, computing in a dtype; return where the checkpoint is."""
    token_dataset().save_to_disk(output.parent / f"data-{output.name}")
    fields = TRAIN_FIELDS | {"elastic_dir": str(output.parent / f"elastic-{output.name}")} | training
    text = recipe(
        {"DepthShrinkingModifier": {"min_depth": 2} | (depth or {"kept_layers": GIVEN_DEPTHS})},
        {"WidthShrinkingModifier": {"widths": ["1", "1/2"], "allocation": "uniform"}},
        {"OneForAllDistillationModifier": fields}, *more,
    )  # fmt: skip
    path = output.parent / f"{output.name}.yaml"
    path.write_text(text)
    options = RunOptions(num_samples=8, max_seq_length=16, dtype=dtype)
    return run_recipe(str(path), str(base), str(output.parent / f"data-{output.name}"), output, options).directory


def tensors(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("quantization", [None, "w8a8", "w4a16"])
def test_a_run_in_float32_saves_in_the_dtype_of_its_base(tmp_path: Path, quantization: str | None) -> None:
    """The same values as a base in float32 gives, rounded once."""
    half, whole = bases(tmp_path)
    more = [SHAPE] if quantization is None else [SHAPE, QUANTIZATION[quantization]]
    found, expected = run(half, tmp_path / "out", *more), run(whole, tmp_path / "expected", *more)
    narrow, wide = tensors(found), tensors(expected)
    assert narrow.keys() == wide.keys()
    for name, tensor in wide.items():
        assert tensor.dtype != torch.bfloat16
        assert torch.equal(narrow[name], tensor.bfloat16() if tensor.dtype == torch.float32 else tensor), name
    assert json.loads((found / "config.json").read_text())["dtype"] == "bfloat16"
    reloaded = AutoModelForCausalLM.from_pretrained(found).eval()
    assert reloaded.dtype == torch.bfloat16
    torch.testing.assert_close(
        logits(reloaded).float(), logits(AutoModelForCausalLM.from_pretrained(expected).eval()), atol=0.3, rtol=0.1
    )
    card = (found / "README.md").read_text()
    assert "saved in bfloat16, logits differ from the elastic model's in float32 by at most" in card
    assert "saved in" not in (expected / "README.md").read_text()


def test_any_shape_is_cut_in_the_dtype_of_the_base_or_in_one_asked_for(tmp_path: Path) -> None:
    half, _ = bases(tmp_path)
    run(half, tmp_path / "out")
    elastic, _ = load_elastic(tmp_path / "elastic-out")
    with elastic.active("2x1/2"):
        expected = logits(elastic.model)
    for dtype, wanted in (("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        out = tmp_path / dtype
        command = ["extract", str(tmp_path / "elastic-out"), "--shape", "2x1/2", "-o", str(out), "--dtype", dtype]
        assert CliRunner().invoke(app, command).exit_code == 0
        subnet = AutoModelForCausalLM.from_pretrained(out).eval()
        assert {tensor.dtype for tensor in tensors(out).values()} == {wanted} == {subnet.dtype}
        difference = (logits(subnet).float() - expected).abs().max().item()
        parity = json.loads((out / "parity.json").read_text())
        assert (parity["dtype"], parity["elastic_dtype"]) == (str(wanted).removeprefix("torch."), "float32")
        assert (difference < 1e-5) == (parity["max_logit_difference"] < 1e-5) == (dtype == "float32")


@pytest.mark.parametrize("base", ["half", "whole"])
def test_a_trained_base_is_saved_in_the_dtype_it_began_with(tmp_path: Path, base: str) -> None:
    """And is still the one that its strategy knows."""
    bases(tmp_path)
    run(tmp_path / base, tmp_path / "out", SHAPE, adapter="none")
    wanted = torch.bfloat16 if base == "half" else torch.float32
    trained = tensors(tmp_path / "elastic-out" / "base")
    assert {tensor.dtype for tensor in trained.values()} == {wanted}
    before = tensors(tmp_path / base)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trained.items() if "proj" in name)
    command = ["extract", str(tmp_path / "elastic-out"), "--shape", "3x1/2", "-o", str(tmp_path / "later")]
    assert CliRunner().invoke(app, command).exit_code == 0
    now, later = tensors(tmp_path / "out"), tensors(tmp_path / "later")
    assert all(torch.equal(later[name], tensor) for name, tensor in now.items())


def test_what_was_computed_in_less_is_not_saved_in_more(tmp_path: Path) -> None:
    _, whole = bases(tmp_path)
    found = run(whole, tmp_path / "out", SHAPE, dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors(found).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        ({"kept_layers": GIVEN_DEPTHS}, "layers given |"),
        ({"selector": "dynamic_program"}, "selector dynamic_program, objective loss; "),
        ({"selector": "block_influence"}, "selector block_influence |"),
        ({"selector": "one_shot", "objective": "perplexity"}, "selector one_shot, objective perplexity |"),
    ],
)
def test_the_saved_recipe_and_the_card_say_what_was_done_where(
    tmp_path: Path, depth: dict[str, Any], words: str
) -> None:
    half, _ = bases(tmp_path)
    found = run(half, tmp_path / "out", SHAPE, depth=depth, max_steps=0)
    saved = yaml.safe_load((found / "recipe.yaml").read_text())
    names = {stage: [name for group in groups.values() for name in group] for stage, groups in saved.items()}
    assert names == {
        "select_stage": ["DepthShrinkingModifier", "WidthShrinkingModifier"],
        "finetune_stage": ["OneForAllDistillationModifier"], "extract_stage": ["SubnetExtractionModifier"],
    }  # fmt: skip
    card = (found / "README.md").read_text()
    assert (found / "recipe.yaml").read_text().strip() in card
    assert f"| depth | {words}" in card
