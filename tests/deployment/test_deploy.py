"""A deployed directory runs alone and computes what the elastic model does; what does not is never written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.deployment import deploy, registry
from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.engine_parity import EngineParity, compared
from amoeba_plugin.deployment.flow import Export
from amoeba_plugin.deployment.rules import read_rules
from amoeba_plugin.deployment.torch_flow import Torch
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArchitectureError, ArtifactError, DeploymentError, PluginError, ShapeError
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import attach_random_smol, random_model, random_strategy

SHAPE = "3x1/2"


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ElasticModel]:
    directory = tmp_path_factory.mktemp("deploy")
    model = random_model(CONFIG)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)
    model.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    live = ElasticModel(model, random_strategy(model))
    save_elastic(live, attach_random_smol(live), directory / "elastic", str(directory / "base"))
    return directory / "elastic", live


class Wrong(Torch):
    """Exchanges two weights of every layer that have the same size, as a wrong table of names would."""

    name = "wrong"

    def export(self, subnet: Path, scheme: str, directory: Path) -> Export:
        export = super().export(subnet, scheme, directory)
        weights = load_file(directory / "model.safetensors")
        changed = {
            name: weights[name.replace("up_proj", "gate_proj") if "up_proj" in name else name].clone()
            for name in weights
        }
        save_file(changed, directory / "model.safetensors", {"format": "pt"})
        return export


def test_what_is_deployed_runs_without_the_elastic_checkpoint_and_says_how(
    elastic: tuple[Path, ElasticModel], tmp_path: Path
):
    directory, live = elastic
    deployed = deploy_shape(directory, SHAPE, "torch:fp32", tmp_path / "out")
    tokens = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), live.active(SHAPE) as model:
        expected = model(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    parity = json.loads((tmp_path / "out/parity.json").read_bytes())
    assert parity["same_top"] == 1
    assert parity["max_difference"] < 1e-4 < parity["logit_range"]
    assert parity["positions"] >= 60
    assert parity["files"]["model.safetensors"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert parity["tensor_types"] == {"F32": 30}
    card = (tmp_path / "out/README.md").read_text()
    assert "from_pretrained" in card
    assert "| shape | `3x1/2`, of 4x1 |" in card
    assert deployed.generated


def test_a_wrong_mapping_is_refused_and_nothing_written(
    elastic: tuple[Path, ElasticModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(registry, "flow_named", lambda name: Wrong())
    with pytest.raises(DeploymentError, match=r"wrong:fp32 computes something else.*nothing was written"):
        deploy_shape(elastic[0], SHAPE, "wrong:fp32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scheme_may_harm_a_subnet_twice_as_much_as_the_whole_model():
    parity = EngineParity("toy:Q4", "toy 1", 90, 0.5, 10.0, 0.03, 0.9)
    whole = replace(parity, mean_kl=0.016, same_top=0.95)
    parity.beside(whole).require_close(exact=False)
    assert "the whole model's are 0.016 nats off at it, 95% the same" in parity.beside(whole).in_words
    with pytest.raises(DeploymentError, match=r"harms this subnet 2\.1 times as much as the whole model"):
        parity.beside(replace(whole, mean_kl=0.014)).require_close(exact=False)
    with pytest.raises(DeploymentError, match="computes something else"):
        parity.require_close(exact=True)
    replace(parity, max_difference=0.099).require_close(exact=True)


def test_comparing_is_what_five_lines_of_torch_would_do():
    torch.manual_seed(3)
    found, wanted = (torch.randn(7, 31, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    parity = compared((found + 0.25).numpy(), wanted.numpy(), point="a:b", engine="c")  # not quite normalised
    divergence = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    assert parity.mean_kl == pytest.approx(divergence.item())
    assert parity.max_difference == pytest.approx((found - wanted).abs().max().item())
    assert parity.same_top == (found.argmax(-1) == wanted.argmax(-1)).double().mean()


@pytest.mark.parametrize(
    ("shape", "flow", "kind", "message"),
    [
        (SHAPE, "torch:elastic", DeploymentError, "take torch:fp32 or torch:bf16"),
        (SHAPE, "torch", DeploymentError, "names no scheme; write one of torch:fp32"),
        (SHAPE, "torch:fp23", DeploymentError, "has no scheme 'fp23'. Did you mean 'fp32'?"),
        (SHAPE, ":fp32", DeploymentError, "write FLOW:SCHEME"),
        (SHAPE, "tourch:fp32", PluginError, "no deployment flow named 'tourch'. Did you mean 'torch'?"),
        ("9x1", "torch:fp32", ShapeError, "9x1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(
    elastic: tuple[Path, ElasticModel], tmp_path: Path, shape: str, flow: str, kind: type[Exception], message: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(deploy, "extract_checkpoint", pytest.fail)
    with pytest.raises(kind) as refusal:
        deploy_shape(elastic[0], shape, flow, tmp_path / "out")
    assert message in str(refusal.value)
    command = ["deploy", str(elastic[0]), "--shape", shape, "--flow", flow, "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_an_engines_rules_are_asked_before_anything_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = random_model(CONFIG)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    save_elastic(ElasticModel(model, random_strategy(model)), None, tmp_path / "elastic", str(tmp_path / "base"))
    rules = tmp_path / "strict.yaml"
    rules.write_text(
        "read: strict 1\nunquantized: [fp32]\nschemes: {}\nrules:\n  - {check: class_among, value: [Other], level: "
        "refuse, says: it knows Other alone, source: its list}\n"
    )
    strict = {"torch": read_rules(rules)}
    monkeypatch.setattr("amoeba_plugin.deployment.rules.engine_rules", lambda: strict)
    monkeypatch.setattr(deploy, "extract_checkpoint", pytest.fail)
    with pytest.raises(ArchitectureError, match="it knows Other alone"):
        deploy_shape(tmp_path / "elastic", SHAPE, "torch:fp32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_an_elastic_checkpoint_is_no_place(
    elastic: tuple[Path, ElasticModel], tmp_path: Path
):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ArtifactError, match="is not empty"):
        deploy_shape(elastic[0], SHAPE, "torch:fp32", tmp_path)
    with pytest.raises(ArtifactError, match="is inside the elastic checkpoint"):
        deploy_shape(elastic[0], SHAPE, "torch:fp32", elastic[0] / "out")
