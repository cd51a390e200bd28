"""Q4_K_M is what llama.cpp's own quantizer makes of the same F16."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amoeba_llama_cpp.converter import Engine
from gguf import GGUFReader
from gguf.quants import dequantize

from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import random_model

SIXTEEN = CONFIG | {"num_hidden_layers": 16, "hidden_size": 256, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "tied, sixteen layers": SIXTEEN,
    "not tied, rows of half blocks": CONFIG | {"num_hidden_layers": 9, "hidden_size": 384, "intermediate_size": 512},
    "rows of no blocks at all": CONFIG | {"hidden_size": 256, "intermediate_size": 272},
    "biases": CONFIG | {"attention_bias": True, "mlp_bias": True, "hidden_size": 256},
    "eight experts": CONFIG | {
        "model_type": "mixtral", "hidden_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "four experts": CONFIG | {
        "model_type": "mixtral", "hidden_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip


def converted(directory: Path, config: dict[str, Any], *schemes: str) -> dict[str, Path]:
    """Return files of a random model by scheme."""
    random_model(config).save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    files = {scheme: directory / f"{scheme}.gguf" for scheme in schemes}
    for scheme, file in files.items():
        Engine().convert(str(directory / "model"), scheme, str(file), "a model")
    return files


def test_first_and_last_layers_and_every_third_have_six_bits_and_values_stay_near(tmp_path: Path):
    files = converted(tmp_path, SIXTEEN, "F32", "Q4_K_M")
    whole, rounded = ({each.name: each for each in GGUFReader(file).tensors} for file in files.values())
    for part in ("attn_v", "ffn_down"):
        six = [layer for layer in range(16) if rounded[f"blk.{layer}.{part}.weight"].tensor_type.name == "Q6_K"]
        assert six == [0, 1, 4, 7, 10, 13, 14, 15]
    assert rounded["token_embd.weight"].tensor_type.name == "Q6_K"  # it is the output too
    assert rounded["blk.0.attn_q.weight"].tensor_type.name == "Q4_K"
    for name, tensor in whole.items():
        its = rounded[name]
        off = dequantize(its.data, its.tensor_type) - tensor.data  # by another implementation, in numpy
        limit = {"Q4_K": 0.1, "Q6_K": 0.03, "F32": 1e-9}[its.tensor_type.name]
        assert np.square(off).mean() < limit**2 * np.square(tensor.data).mean(), name


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_byte_for_byte_what_llama_cpp_makes(kind: str, tmp_path: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python, which compiles llama.cpp")
    files = converted(tmp_path, MODELS[kind], "F16", "Q4_K_M")
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype, theirs = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(bytes(files["F16"]), bytes(theirs), ctypes.byref(asked)) == 0
    mine, other = GGUFReader(files["Q4_K_M"]), GGUFReader(theirs)
    types = [{each.name: each.tensor_type.name for each in reader.tensors} for reader in (mine, other)]
    assert types[0] == types[1]
    data = {each.name: each.data for each in other.tensors}
    assert [each.name for each in mine.tensors if not np.array_equal(each.data, data[each.name])] == []
    said = [
        {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        for reader in (mine, other)
    ]
    assert said[0] == said[1]


def test_a_library_without_the_quantizer_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ctypes, "CDLL", lambda path: object())
    with pytest.raises(RuntimeError, match=r"pip install xllamacpp==.*take Q4_0"):
        converted(tmp_path, CONFIG, "Q4_K_M")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
