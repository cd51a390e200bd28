"""Which architectures come through the model builder right, and what the rules refuse because it would not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from amoeba_onnxruntime import flow as module
from amoeba_onnxruntime.flow import OnnxRuntime

from amoeba_plugin.deployment.engine_parity import EngineParity, measure_engine
from amoeba_plugin.deployment.flow import Exporter, Point
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import random_model, random_strategy

TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
WINDOWS = {"layer_types": TYPES, "use_sliding_window": True, "sliding_window": 9}  # shorter than what is compared
CUT_AWAY = {**WINDOWS, "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 128}
PHI3 = {"model_type": "phi3", "original_max_position_embeddings": 512}
MULTIPLIERS = {
    "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
}  # fmt: skip

RIGHT: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, llama3 positions": {"rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, windows": {"model_type": "mistral", "sliding_window": 9},
    "mistral, linear positions": {"model_type": "mistral", "sliding_window": None, "rope_parameters": LINEAR},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, windows": {"model_type": "qwen2", **WINDOWS},
    "qwen3": {"model_type": "qwen3"},
    "qwen3, windows": {"model_type": "qwen3", **WINDOWS},
    "qwen3, windows cut away": {"model_type": "qwen3", **CUT_AWAY},
    "phi3": {**PHI3, "sliding_window": None},
    "phi3, windows": {**PHI3, "sliding_window": 9},
    "granite": {"model_type": "granite", **MULTIPLIERS},
    "granite with biases": {"model_type": "granite", **MULTIPLIERS, "attention_bias": True, "mlp_bias": True},
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": None, "query_pre_attn_scalar": 16},
    "heads of 48": {"head_dim": 48},
}
# What the rules refuse, with a word of the refusal; without the rules it fails or computes something else.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "llama, linear positions": ({"rope_parameters": LINEAR}, "rotary positions of type linear"),
    "llama, yarn": ({"rope_parameters": YARN}, "rotary positions of type yarn"),
    "mistral, yarn": ({"model_type": "mistral", "rope_parameters": YARN}, "rotary positions of type yarn"),
    "as many neurons as tokens": ({"intermediate_size": 1024}, "gate_proj .512 outputs"),
    "heads of 8": ({"head_dim": 8}, "multiple of 16"),
    "heads of 24": ({"head_dim": 24}, "multiple of 16"),
    "gemma3": ({"model_type": "gemma3_text", "query_pre_attn_scalar": 32}, "KeyError rope_type"),
    "smollm3": ({"model_type": "smollm3"}, "KeyError position_ids"),
    "gemma2, capped": ({"model_type": "gemma2", "attn_logit_softcapping": 2.0}, "attn_logit_softcapping is set"),
    "olmo2": ({"model_type": "olmo2"}, "no export for this class"),
}


@pytest.fixture(scope="module")
def export() -> Iterator[Exporter]:
    with OnnxRuntime().exporting() as one:
        yield one


def subnet(fields: dict[str, Any], directory: Path) -> Path:
    """Save a random model cut to the layers 0, 2 and 3 at half the width."""
    model = random_model({**CONFIG, **fields})
    cut = extract(ElasticModel(model, random_strategy(model)), "3x1/2")
    if not cut.config.tie_word_embeddings:
        with torch.no_grad():  # too loud otherwise: one token would have all the probability
            cut.get_output_embeddings().weight.mul_(0.2)
    cut.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def measured(export: Exporter, checkpoint: Path, directory: Path, scheme: str = "fp32") -> EngineParity:
    directory.mkdir()
    written = export(checkpoint, scheme, directory)
    return measure_engine(OnnxRuntime(), Point("onnxruntime", scheme), written, directory, checkpoint)


@pytest.mark.parametrize("name", RIGHT)
def test_it_computes_what_torch_does_also_behind_a_window(name: str, export: Exporter, tmp_path: Path):
    parity = measured(export, subnet(RIGHT[name], tmp_path / "subnet"), tmp_path / "out")
    assert parity.max_difference < 5e-4 * parity.logit_range  # deploying allows twenty times as much
    assert parity.positions > 80


def test_rows_that_are_no_whole_blocks_are_quantized_too(export: Exporter, tmp_path: Path):
    checkpoint = subnet({"intermediate_size": 80}, tmp_path / "subnet")  # 40 neurons: a block, and a quarter
    parity = measured(export, checkpoint, tmp_path / "out", "int4")
    assert 0 < parity.mean_kl < 0.1


@pytest.mark.parametrize("window", [9, 400])
def test_both_programs_say_the_same_of_windows_shorter_and_longer_than_the_text(
    window: int, export: Exporter, tmp_path: Path
):
    checkpoint = subnet({"model_type": "mistral", "sliding_window": window}, tmp_path / "subnet")
    (tmp_path / "out").mkdir()
    ways = OnnxRuntime().ways_to_run(export(checkpoint, "fp32", tmp_path / "out"))
    said = [
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, check=True).stdout
        for _, _, program in ways
    ]
    assert len(said) == 2
    assert said[0] == said[1]
    assert len(said[0]) > len("The capital of France is")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_would_fail_or_compute_something_else(
    name: str, export: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fields, said = WRONG[name]
    checkpoint = subnet(fields, tmp_path / "subnet")
    (tmp_path / "refused").mkdir()
    with pytest.raises(DeploymentError, match=said):
        export(checkpoint, "fp32", tmp_path / "refused")
    assert not any((tmp_path / "refused").iterdir())
    monkeypatch.setattr(module, "_require_held", lambda *_: None)
    with OnnxRuntime().exporting() as another, pytest.raises(DeploymentError, match=r"failed|something else"):
        measured(another, checkpoint, tmp_path / "out").require_close(exact=True)
