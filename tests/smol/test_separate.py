"""`amoeba extract --adapter separate`: the subnet and its LoRA side by side, for tools that know only LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.elastic.checkpoint import attach_smol, save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import AdapterError, ArchitectureError, ArtifactError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.smol import SmolConfig
from support.models import random_elastic

WITHOUT_PLUGIN = """
import sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "amoeba_plugin":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from pathlib import Path
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
tokens, found = torch.load(root / "tokens.pt"), {}
for subnet in sorted((root / "separate").iterdir()):
    base = AutoModelForCausalLM.from_pretrained(subnet)
    with torch.no_grad():
        found[subnet.name] = PeftModel.from_pretrained(base, subnet / "adapter").eval()(tokens).logits
auto = AutoPeftModelForCausalLM.from_pretrained(subnet / "adapter").eval()  # finds the subnet by itself
assert torch.equal(auto(tokens).logits, found[subnet.name])
torch.save(found, root / "found.pt")
"""


@pytest.fixture
def trained(tiny_model: Callable[..., Any], randomize: Callable[..., None], tmp_path: Path) -> Callable[..., Any]:
    def trained(bias_compensation: bool = False, tied: bool = False, **fields: Any) -> ElasticModel:
        """Save an elastic checkpoint with a random adapter in ``tmp_path/elastic``."""
        model = tiny_model("llama", tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / "base")
        elastic = random_elastic(model, bias_compensation=bias_compensation)
        settings: dict[str, Any] = dict(r=3, num_experts=4, target_modules="all-linear", task_type="CAUSAL_LM")
        peft_model = attach_smol(elastic, SmolConfig(**(settings | fields))).eval()
        randomize(peft_model, only="smol_")
        save_elastic(elastic, peft_model, tmp_path / "elastic", str(tmp_path / "base"))
        return elastic

    return trained


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT, for a targeted lm_head of any method
@pytest.mark.parametrize("combination", ["factors", "outputs"])
def test_stock_peft_serves_every_shape(
    trained: Callable[..., ElasticModel], tokens: Tensor, tmp_path: Path, combination: str
) -> None:
    elastic = trained(
        combination=combination,
        bias_compensation=combination == "outputs",
        rank_pattern={"q_proj": 5, "layers.1.*up_proj": 2},
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"],
    )
    torch.save(tokens, tmp_path / "tokens.pt")
    for shape in elastic.space:
        output = tmp_path / "separate" / str(shape).replace("/", "_")
        parity = extract_checkpoint(tmp_path / "elastic", shape, output, adapter="separate")
        assert parity.max_logit_difference <= 1e-4
        document = json.loads((output / "parity.json").read_text())
        assert (document["adapter"], document["shape"]) == ("separate", str(shape))
    subprocess.run([sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path)], check=True, cwd=tmp_path, timeout=240)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 9
    for shape in elastic.space:
        logits = found[str(shape).replace("/", "_")]
        with torch.no_grad():
            torch.testing.assert_close(logits, extract(elastic, shape)(tokens).logits, rtol=0, atol=1e-5)
    bare = AutoModelForCausalLM.from_pretrained(output)
    assert not torch.allclose(logits, bare(tokens).logits, atol=1e-2)


def test_the_lora_is_an_ordinary_one_of_the_subnet(trained: Callable[..., ElasticModel], tmp_path: Path) -> None:
    trained()
    output = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["extract", str(tmp_path / "elastic"), "--shape", "2x1/2", "--adapter", "separate", "-o", str(output)]
    )
    assert result.exit_code == 0, result.output
    config = PeftConfig.from_pretrained(str(output / "adapter"))
    assert type(config) is LoraConfig
    assert config.base_model_name_or_path == str(output.resolve())
    assert config.r == 6  # two experts of rank 3
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    base = load_file(output / "model.safetensors")
    for name, tensor in tensors.items():
        weight = base[name.removeprefix("base_model.model.").replace("lora_A.", "").replace("lora_B.", "")]
        assert tensor.shape == ((6, weight.shape[1]) if "lora_A" in name else (weight.shape[0], 6))


def test_modules_trained_in_full_are_folded(
    trained: Callable[..., ElasticModel], randomize: Callable[..., None], tokens: Tensor, tmp_path: Path
) -> None:
    elastic = trained(modules_to_save=["lm_head"], target_modules=["q_proj"])
    parity = extract_checkpoint(tmp_path / "elastic", "3x3/4", tmp_path / "out")
    assert parity.adapter == "fold"
    assert parity.max_logit_difference <= 1e-4
    randomize(elastic.model, only="lm_head.modules_to_save")
    with elastic.active("2x1/2") as model, torch.no_grad():
        torch.testing.assert_close(extract(elastic, "2x1/2")(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_head_stays_separate(trained: Callable[..., ElasticModel], tmp_path: Path) -> None:
    trained(tied=True, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ArchitectureError, match="ties them to one weight; extract with the adapter separate"):
        extract_checkpoint(tmp_path / "elastic", "3x3/4", tmp_path / "out")
    parity = extract_checkpoint(tmp_path / "elastic", "3x3/4", tmp_path / "out", adapter="separate")
    assert parity.max_logit_difference <= 1e-4


def test_what_cannot_be_separate_is_refused(
    trained: Callable[..., ElasticModel], tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    trained(modules_to_save=["lm_head"], target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="also holds whole modules"):
        extract_checkpoint(tmp_path / "elastic", "2x1", tmp_path / "out", adapter="separate")
    with pytest.raises(AdapterError, match="no place in layers padded with zeros; leave out --portable or --adapter"):
        extract_checkpoint(tmp_path / "elastic", "2x1", tmp_path / "out", adapter="separate", portable=True)
    save_elastic(random_elastic(tiny_model("llama")), None, tmp_path / "bare", str(tmp_path / "base"))
    with pytest.raises(ArtifactError, match="has no adapter, nothing was trained; leave out --adapter separate"):
        extract_checkpoint(tmp_path / "bare", "2x1", tmp_path / "out", adapter="separate")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
