"""What `amoeba loads` says: the data file, single rules, and that transformers keeps what it promises."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.deployment.loads import uniform_sizes
from amoeba_plugin.deployment.rules import CHECKS, Candidate, candidate, engine_rules, findings, require_loadable
from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.elastic.subnet_config import config_for
from amoeba_plugin.errors import ArchitectureError, RecipeError, ShapeError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.testing.flows import KINDS, allowed, promised, save_subnet


def seven_b(model_type: str = "llama", **fields: object) -> PretrainedConfig:
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 11008}
    return AutoConfig.for_model(model_type, **{"num_hidden_layers": 32, **sizes, **fields})


def subject(
    config: PretrainedConfig, shape: str, engine: str, scheme: str | None = None, devices: int = 1, round_to: int = 1
) -> Candidate:
    adapter = architecture_for(config.model_type)
    subnet = config_for(adapter, config, uniform_sizes(adapter, config, SubnetShape.parse(shape), round_to))
    return candidate(subnet, adapter, engine, scheme, devices)


def broken(found: Candidate, engine: str) -> set[tuple[str, str]]:
    return {(finding.rule.check, finding.rule.level) for finding in findings(found, engine)}


def test_every_rule_names_a_check_and_a_source_and_every_check_is_used():
    rules = [rule for engine in engine_rules().values() for rule in engine.rules]
    assert {rule.check for rule in rules} == set(CHECKS)
    for name, engine in engine_rules().items():
        known = None if engine.schemes == "compressed-tensors" else set(engine.schemes)
        for rule in engine.rules:
            assert rule.source
            assert not set(rule.schemes or ()) - (known or set(rule.schemes or ())), (name, rule.check)


@pytest.mark.parametrize(
    ("shape", "engine", "scheme", "devices", "round_to", "expected"),
    [
        ("24x7/8", "vllm", None, 1, 1, set()),
        ("24x7/8", "vllm", "W4A16", 1, 128, set()),
        ("24x7/8", "vllm", "W4A16", 1, 1, {("groups_divide_inputs", "refuse"), ("inputs_multiple", "warn"),
                                           ("outputs_multiple", "warn")}),
        ("24x7/8", "vllm", "W8A8", 2, 128, {("heads_split", "refuse")}),  # 7 KV heads
        ("24x3/4", "vllm", "W8A8", 2, 128, set()),
        ("24x7/8", "llama-cpp", "Q8_0", 1, 1, set()),
        ("24x7/8", "llama-cpp", "Q4_K_M", 1, 1, {("inputs_multiple", "warn")}),
        ("24x7/8", "llama-cpp", "Q4_K_M", 1, 512, set()),
        ("24x7/8", "openvino", "INT4", 1, 1, {("inputs_multiple", "refuse"), ("heads_fill_hidden", "warn")}),
        ("24x1", "openvino", "INT4", 1, 1, set()),
        ("24x7/8", "onnxruntime", "int4", 1, 1, set()),
        ("24x7/8", "torch", "W4A16", 1, 1, {("groups_divide_inputs", "refuse")}),
        ("24x7/8", "torch", "W8A8", 1, 1, set()),
    ],
)  # fmt: skip
def test_llama_sizes(
    shape: str, engine: str, scheme: str | None, devices: int, round_to: int, expected: set[tuple[str, str]]
):
    assert broken(subject(seven_b(), shape, engine, scheme, devices, round_to), engine) == expected


def test_heads_of_qwen2_cannot_go_for_vllm_but_layers_and_neurons_can():
    assert broken(subject(seven_b("qwen2"), "24x7/8", "vllm"), "vllm") == {("heads_fill_hidden", "refuse")}
    assert broken(subject(seven_b("qwen2"), "24x1", "vllm"), "vllm") == set()


@pytest.mark.parametrize("engine", ["vllm", "onnxruntime", "openvino"])
def test_compensating_biases_have_a_place_in_torch_and_llama_cpp_alone(engine: str):
    config, adapter = seven_b(), architecture_for("llama")
    units = {"attention": 7, "mlp": 9600}
    biased = candidate(adapter.subnet_config(config, range(4), units, frozenset(units)), adapter, engine)
    assert biased.class_name == "SeedOssForCausalLM"
    with pytest.raises(ArchitectureError, match="cannot load it"):
        require_loadable(biased, engine)
    assert broken(biased, engine) & {("field_is_off", "refuse"), ("class_among", "refuse")}
    assert not broken(biased, "torch") | broken(biased, "llama-cpp")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_of_every_engine_what_its_rules_say(kind: str, tmp_path: Path):
    page, subnet = Path(__file__).parents[2] / "README.md", save_subnet(tmp_path / "subnet", kind)
    assert {engine: allowed(subnet, engine) for engine in engine_rules()} == {
        engine: promised(page, engine)[kind] for engine in engine_rules()
    }


@pytest.mark.parametrize("engine", ["torch", "vllm", "llama-cpp", "onnxruntime", "openvino"])
def test_layers_of_different_sizes_have_no_place_elsewhere_but_in_llama_cpp_for_llamas(engine: str):
    config = seven_b(num_hidden_layers=4)
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {1: {"intermediate_size": 9600}}
    found = broken(candidate(config, architecture_for("llama"), engine), engine)
    expected = {"torch": {("layers_alike", "warn")}, "llama-cpp": set()}  # as architecture deci
    assert found == expected.get(engine, {("layers_alike", "refuse")})


def test_what_onnx_runtimes_builder_would_write_wrong_is_refused():
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    refused = {("rope_type_among", "refuse")}
    assert broken(subject(seven_b(rope_parameters=scaled), "24x1", "onnxruntime"), "onnxruntime") == refused
    mistral = seven_b("mistral", rope_parameters=scaled)
    assert broken(subject(mistral, "24x1", "onnxruntime"), "onnxruntime") == set()
    tokens = seven_b(vocab_size=9632)  # as many as there are neurons at seven eighths
    found = subject(tokens, "24x7/8", "onnxruntime")
    assert broken(found, "onnxruntime") == {("outputs_unlike_vocabulary", "refuse")}
    assert broken(subject(tokens, "24x3/4", "onnxruntime"), "onnxruntime") == set()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_asked_about_one_by_one(model_type: str):
    neurons = {"intermediate_size": 1024, "moe_intermediate_size": 1024} if model_type == "qwen3_moe" else {}
    whole = seven_b(model_type, **{"intermediate_size": 1024, "num_experts": 4, "num_local_experts": 4, **neurons})
    assert not broken(subject(whole, "24x3/4", "torch", "W4A16"), "torch")
    narrow = subject(whole, "24x7/8", "torch", "W4A16", round_to=8)
    assert broken(narrow, "torch") == set()  # 896 neurons
    assert narrow.linears["down_proj"] == (896, 4096)
    odd = subject(whole, "24x13/16", "torch", "W4A16", round_to=8)  # 832 neurons
    assert broken(odd, "torch") == {("groups_divide_inputs", "refuse")}
    for scheme in ("W8A8", "FP8_DYNAMIC", "W4A16_ASYM", "NVFP4A16"):
        assert ("experts_readable", "refuse") in broken(subject(whole, "24x3/4", "torch", scheme), "torch")
    assert ("experts_readable", "refuse") not in broken(subject(whole, "24x3/4", "vllm", "W8A8"), "vllm")


def test_a_first_layer_without_experts_does_not_hide_those_of_the_others():
    whole, adapter = seven_b("mixtral", num_local_experts=4, num_hidden_layers=3), architecture_for("mixtral")
    sizes = [{"attention": 8, "mlp": 11008}] * 3
    config = config_for(adapter, whole, LayerSizes(range(3), sizes, {0: "mlp"}))
    assert {"down_proj of layer 1", "down_proj of layer 2"} <= candidate(config, adapter, "vllm").split_inputs


def test_what_is_unknown_is_refused_with_what_there_is():
    with pytest.raises(RecipeError, match="take one of llama-cpp, onnxruntime, openvino, torch, vllm"):
        subject(seven_b(), "24x1", "tgi")
    with pytest.raises(RecipeError, match="Take one of F32, F16"):
        subject(seven_b(), "24x1", "llama-cpp", "W4A16")
    with pytest.raises(ShapeError, match="more layers than the model"):
        subject(seven_b(), "33x1", "vllm")


def test_the_command_tells_what_an_engine_loads(tmp_path: Path):
    seven_b(num_key_value_heads=32).save_pretrained(tmp_path)

    def loads(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["loads", *arguments])
        return result.exit_code, result.stderr

    on = ("--model", str(tmp_path))
    code, said = loads("24x7/8", *on, "--flow", "llama-cpp:Q4_K_M")
    assert code == 0
    assert "warning: down_proj (9632 inputs)" in said
    assert "can load it, as MistralForCausalLM" in said
    code, said = loads("24x7/8", *on, "--flow", "vllm:W4A16")
    assert code == 2
    assert "https://github.com/vllm-project/vllm" in said
    rounded = ("24x7/8", *on, "--flow", "vllm:W4A16", "--round-to", "128")
    assert loads(*rounded)[0] == 0
    code, said = loads(*rounded, "--tensor-parallel", "4")
    assert code == 2
    assert "down_proj (2400 inputs)" in said


QUANTIZED = st.sampled_from([None, "W8A8", "W4A16"])
SIZES = st.fixed_dictionaries(
    {
        "num_key_value_heads": st.integers(1, 4),
        "intermediate_size": st.sampled_from([64, 128, 192, 256]),
        "head_dim": st.sampled_from([16, 32, 64]),
    }
)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=SIZES, queries=st.sampled_from([1, 2]), eighths=st.integers(1, 8), depth=st.integers(1, 2), scheme=QUANTIZED,
    model_type=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
)  # fmt: skip
def test_what_is_accepted_for_transformers_saves_and_reloads(
    sizes: dict[str, int], queries: int, eighths: int, depth: int, scheme: str | None, model_type: str
):
    heads = sizes["num_key_value_heads"] * queries
    whole = AutoConfig.for_model(
        model_type, num_hidden_layers=2, num_attention_heads=heads, hidden_size=128 if heads in (1, 2, 4, 8) else 384,
        vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes,
    )  # fmt: skip
    shape = SubnetShape.parse(f"{depth}x{eighths}/8")
    adapter = architecture_for(model_type)
    config = config_for(adapter, whole, uniform_sizes(adapter, whole, shape))
    found = candidate(config, architecture_for(model_type), "torch", scheme)
    accepted = not any(finding.rule.level == "refuse" for finding in findings(found, "torch"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as scratch:
        base, out = Path(scratch) / "base", Path(scratch) / "out"
        model.save_pretrained(base)
        if scheme is None:
            assert accepted
            compressed, out = model, base
        else:
            modifier = QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=["lm_head"])
            reset_session()
            if not accepted:
                # fewer inputs than a group fail later than inputs that are no multiple of it
                with pytest.raises((ValueError, RuntimeError), match=r"not divisible by group_size|unflatten"):
                    oneshot(model=str(base), recipe=modifier, output_dir=str(out))
                return
            compressed = oneshot(model=str(base), recipe=modifier, output_dir=str(out))
        reloaded = AutoModelForCausalLM.from_pretrained(out)
        tokens = torch.arange(3, 15)[None]
        with torch.no_grad():
            torch.testing.assert_close(reloaded(tokens).logits, compressed(tokens).logits, atol=1e-4, rtol=0)
        stated = reloaded.config.to_dict()
        for name in (
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "head_dim",
        ):
            assert stated[name] == getattr(config, name)
