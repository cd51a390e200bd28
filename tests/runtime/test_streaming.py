"""Extraction with the base model's weights left on disk: the same bytes as with the whole model in memory."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.extraction import checkpoint
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.runtime.streaming import streamed_model
from amoeba_plugin.smol import SmolConfig
from support.strategies import random_strategy, uneven_strategy

TinyModel = Callable[..., PreTrainedModel]
SHAPE = "3x3/4"


def write_elastic(model: PreTrainedModel, strategy: SubnetStrategy, root: Path, **saving: object) -> Path:
    """Write a base of several shards and an elastic checkpoint with a random adapter."""
    model.save_pretrained(root / "base", **{"max_shard_size": "60KB", **saving})
    elastic = ElasticModel(model, strategy)
    config = SmolConfig(r=4, num_experts=3, top_k=2, target_modules="all-linear", init_weights=False)
    save_elastic(elastic, attach_smol(elastic, config).eval(), root / "elastic", str(root / "base"))
    return root / "elastic"


def is_placeholder(parameter: nn.Parameter) -> bool:
    return parameter.stride() == (0,) * parameter.dim()


def base_parameters(elastic: ElasticModel) -> list[nn.Parameter]:
    return [parameter for name, parameter in elastic.model.named_parameters() if "smol" not in name]


@pytest.mark.parametrize(
    ("model_type", "tied", "compensated", "uneven"),
    [
        ("llama", False, False, False),
        ("llama", True, True, True),
        ("mistral", False, False, True),
        ("qwen2", True, True, False),
        ("qwen3", False, False, True),
    ],
)
def test_streamed_extraction_writes_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, model_type: str, tied: bool, compensated: bool, uneven: bool
) -> None:
    model = tiny_model(model_type, tie_word_embeddings=tied)
    strategy = (uneven_strategy if uneven else random_strategy)(model, bias_compensation=compensated)
    directory = write_elastic(model, strategy, tmp_path)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    for stream in (False, True):
        elastic, _ = load_elastic(directory, stream=stream)
        assert all(is_placeholder(parameter) == stream for parameter in base_parameters(elastic))
        extract(elastic, SHAPE).save_pretrained(tmp_path / str(stream), max_shard_size="50KB")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "False").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "True").iterdir()} == whole
    assert "model.safetensors.index.json" in whole


def test_a_streamed_model_computes_the_same_and_holds_one_layer(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    directory = write_elastic(model, random_strategy(model), tmp_path)
    streamed, _ = load_elastic(directory, stream=True)
    whole, _ = load_elastic(directory)
    held: list[int] = []
    for layer in streamed.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda *_: held.append(sum(not is_placeholder(each) for each in base_parameters(streamed)))
        )
    tokens = torch.arange(10)[None]
    for shape in streamed.space:
        with streamed.active(shape), whole.active(shape), torch.no_grad():
            assert torch.equal(streamed.model(tokens).logits, whole.model(tokens).logits)
    assert set(held) == {9}  # 7 linears and 2 norms
    assert all(map(is_placeholder, base_parameters(streamed)))


class Holdings(TorchDispatchMode):
    """Notes at every operation of torch how many parameters of the base are in memory."""

    def __init__(self, elastic: ElasticModel) -> None:
        super().__init__()
        self.elastic, self.counts = elastic, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.add(sum(not is_placeholder(each) for each in base_parameters(self.elastic)))
        return function(*args, **kwargs or {})


def test_extraction_holds_one_layer_of_the_base(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    streamed, _ = load_elastic(write_elastic(model, random_strategy(model), tmp_path), stream=True)
    with Holdings(streamed) as holdings:
        extract(streamed, SHAPE)
    assert {1, 9} <= holdings.counts  # the embeddings; 7 linears and 2 norms
    assert max(holdings.counts) == 9


def test_a_subnet_outlives_its_base_and_the_base_is_not_written_to(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Weights are views of the base's files, and their channels are reordered in place."""
    model = tiny_model("llama")
    directory = write_elastic(model, random_strategy(model), tmp_path)
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    streamed, _ = load_elastic(directory, stream=True)
    subnet = extract(streamed, SHAPE)
    streamed.model(torch.arange(10)[None])
    assert [path.read_bytes() for path in files] == before
    cut = {name: tensor.clone() for name, tensor in subnet.state_dict().items()}
    for path in files:
        with path.open("r+b") as file:  # in place: what is mapped sees it
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in subnet.state_dict().items())


def test_an_error_in_the_middle_of_a_forward_drops_what_was_loaded(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    streamed, _ = load_elastic(write_elastic(model, random_strategy(model), tmp_path), stream=True)

    def fail(*_: object) -> None:
        raise KeyError

    handle = streamed.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        streamed.model(torch.arange(10)[None])
    assert all(map(is_placeholder, base_parameters(streamed)))
    handle.remove()
    assert torch.isfinite(streamed.model(torch.arange(10)[None]).logits).all()


def test_the_files_dtype_may_differ_from_the_one_computed_in(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path)
    streamed, weights = streamed_model(str(tmp_path), "float32") or pytest.fail("not streamed")
    with weights.loaded(streamed.model.norm):
        assert torch.equal(streamed.model.norm.weight, model.model.norm.weight.float())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_that_a_checkpoint_keeps_apart_are_streamed_too(
    tiny_model: TinyModel, tmp_path: Path, model_type: str
) -> None:
    sizes = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16}  # 10 comes after 9, not after 1
    fields = sizes if model_type == "qwen3_moe" else {"num_local_experts": 12, "intermediate_size": 16}
    model = tiny_model(model_type, **fields)
    directory = write_elastic(model, random_strategy(model), tmp_path)
    with safe_open(sorted((tmp_path / "base").glob("*.safetensors"))[-1], framework="pt") as file:
        assert not any("gate_up_proj" in key for key in file.keys())  # noqa: SIM118
    streamed, _ = load_elastic(directory, stream=True)
    assert all(map(is_placeholder, base_parameters(streamed)))
    whole, _ = load_elastic(directory)
    tokens = torch.arange(10)[None]
    for shape in ("4x1", "3x1/2"):
        with streamed.active(shape), whole.active(shape), torch.no_grad():
            assert torch.equal(streamed.model(tokens).logits, whole.model(tokens).logits)


def test_a_base_in_another_layout_is_loaded_as_a_whole_and_the_log_says_so(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    directory = write_elastic(model, random_strategy(model), tmp_path)
    for file in (tmp_path / "base").glob("*.safetensors*"):
        file.unlink()
    torch.save(tiny_model("llama").state_dict(), tmp_path / "base" / "pytorch_model.bin")
    elastic, _ = load_elastic(directory, stream=True)
    assert not any(map(is_placeholder, base_parameters(elastic)))
    assert "loaded as a whole" in caplog.text
    assert "no safetensors files" in caplog.text


def test_a_checkpoint_without_a_tensor_is_not_streamed_and_the_log_names_it(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert streamed_model(str(tmp_path), "float32") is None
    assert "hold no model.layers.2.mlp.up_proj.weight" in caplog.text


def test_a_checkpoint_of_the_decoder_alone_is_streamed(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("qwen3", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)  # its names begin with "layers.", not "model.layers."
    streamed, weights = streamed_model(str(tmp_path), "float32") or pytest.fail("not streamed")
    layer = streamed.model.layers[1]
    with weights.loaded(layer):
        assert torch.equal(layer.mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_an_extracted_checkpoint_brings_what_belongs_to_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 7
    directory = write_elastic(model, uneven_strategy(model), tmp_path)
    extract_checkpoint(directory, SHAPE, tmp_path / "out", max_shard_size="60KB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "parity.json", "README.md", "modeling_per_layer.py"} <= names
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) <= names
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert reloaded.generation_config.max_new_tokens == 7
    card = (tmp_path / "out/README.md").read_text()
    parameters = sum(parameter.numel() for parameter in reloaded.parameters())
    whole = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    for said in (f"{parameters:,} of {whole:,}", "`3x3/4`", "0, 2, 3", "trust_remote_code=True", "folded in", "parity"):
        assert said in card
    extract_checkpoint(directory, SHAPE, tmp_path / "padded", portable=True)
    card = (tmp_path / "padded/README.md").read_text()
    assert "no speed is gained" in card
    assert "trust_remote_code" not in card


@contextmanager
def files_end_at(limit: int) -> Iterator[None]:
    """Let the operating system refuse to make any file longer than this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        while tqdm.get_lock().th_lock._is_owned():  # tqdm keeps it where it cannot write its bar, here to a file
            tqdm.get_lock().release()


@pytest.mark.parametrize("limit", [100, 30_000])
def test_a_write_that_fails_leaves_nothing(tiny_model: TinyModel, tmp_path: Path, limit: int) -> None:
    """100 bytes end in the configuration, 30,000 in the weights."""
    model = tiny_model("llama")
    directory = write_elastic(model, random_strategy(model), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with files_end_at(limit), pytest.raises((ArtifactError, OSError), match="too large"):
        extract_checkpoint(directory, SHAPE, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_below_a_file_is_refused_before_the_base_is_loaded(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    directory = write_elastic(model, random_strategy(model), tmp_path)
    monkeypatch.setattr(checkpoint, "load_elastic", None)
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(ArtifactError, match="Not a directory"):
        extract_checkpoint(directory, SHAPE, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "years of work"
