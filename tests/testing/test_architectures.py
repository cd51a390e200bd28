"""Every architecture that comes with the package, in the suite that a stranger's adapter can subclass."""

from __future__ import annotations

import pytest
import torch
from support.architectures import CONFIGS, MULTIPLIERS, NO_ROPE, TYPES
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.builtin import amoeba_architectures
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.testing.architectures import WIDTHS, ArchitectureConformance, random_model, random_strategy


class LayerTypes(ArchitectureConformance):
    def check_subnet(self, subnet: PreTrainedModel, kept: tuple[int, ...]) -> None:
        assert subnet.config.layer_types == [TYPES[index] for index in kept]


class TestLlama(ArchitectureConformance):
    config = CONFIGS["llama"]


class TestMistral(ArchitectureConformance):
    config = CONFIGS["mistral"]


class TestQwen2(LayerTypes):
    config = CONFIGS["qwen2"]


class TestQwen3(LayerTypes):
    config = CONFIGS["qwen3"]


class TestOlmo2(ArchitectureConformance):
    config = CONFIGS["olmo2"]

    def test_a_narrow_shape_normalises_over_the_channels_it_keeps(self) -> None:
        """By hand: Olmo2ForCausalLM of that size, filled from the untouched model by index."""
        whole, width = self.model(), WIDTHS[1]
        strategy = random_strategy(whole)
        subnet = random_model({**self.config, "num_attention_heads": 6, "num_key_value_heads": 3,
                               "intermediate_size": 48})  # fmt: skip
        subnet.load_state_dict({
            name: by_hand(name, tensor, strategy.width.order) for name, tensor in whole.state_dict().items()
        })  # fmt: skip
        expected = self.logits(subnet)
        with ElasticModel(whole, strategy).active(f"4x{width}") as model:
            torch.testing.assert_close(self.logits(model), expected, atol=1e-4, rtol=0)


def by_hand(name: str, tensor: torch.Tensor, order: dict[str, torch.Tensor]) -> torch.Tensor:
    part = name.split(".")[-2]
    if part in ("q_proj", "q_norm", "o_proj", "k_proj", "k_norm", "v_proj"):
        size = 16 if part[0] in "qo" else 8  # 2 query heads of 8 channels share a KV head
        kept = [c for unit in order[f"{name.split('.')[2]}.attention"][:3].tolist()
                for c in range(unit * size, unit * size + size)]  # fmt: skip
        return tensor[:, kept] if part == "o_proj" else tensor[kept]
    if part in ("gate_proj", "up_proj", "down_proj"):
        kept = order[f"{name.split('.')[2]}.mlp"][:48].tolist()
        return tensor[:, kept] if part == "down_proj" else tensor[kept]
    return tensor


class TestGranite(ArchitectureConformance):
    config = CONFIGS["granite"]

    def check_subnet(self, subnet: PreTrainedModel, kept: tuple[int, ...]) -> None:
        assert {name: getattr(subnet.config, name) for name in MULTIPLIERS} == MULTIPLIERS


class TestSmolLM3(LayerTypes):
    config = CONFIGS["smollm3"]

    def check_subnet(self, subnet: PreTrainedModel, kept: tuple[int, ...]) -> None:
        super().check_subnet(subnet, kept)
        assert subnet.config.no_rope_layers == [NO_ROPE[index] for index in kept]


class TestPhi3(ArchitectureConformance):
    config = CONFIGS["phi3"]

    def test_rotary_factors_of_a_long_context_keep_attention_whole(self) -> None:
        factors = [1.0 + index for index in range(6)]  # hidden 96 / 8 heads = 12 channels, which rotate in pairs
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
        model = random_model(self.config | {"head_dim": 12, "rope_parameters": rope})
        adapter = architecture_for("phi3")
        subnet = adapter.subnet_config(model.config, (1, 3), {"attention": 4, "mlp": 32})
        assert (subnet.num_hidden_layers, subnet.intermediate_size) == (2, 32)
        with pytest.raises(ArchitectureError, match=r"round_to: \{attention: 96\}"):
            adapter.subnet_config(model.config, (1, 3), {"attention": 3, "mlp": 32})


class OffsetNorms(LayerTypes):
    def test_heads_that_do_not_divide_the_hidden_size_are_refused_with_those_that_do(self) -> None:
        model = random_model(self.config | {"hidden_size": 64})
        elastic = ElasticModel(model, random_strategy(model))
        with pytest.raises(ArchitectureError, match="with 6 heads on hidden size 64: .* possible are 2, 4, 8"):
            extract(elastic, "4x3/4")


class TestGemma2(OffsetNorms):
    config = CONFIGS["gemma2"]


class TestGemma3Text(OffsetNorms):
    config = CONFIGS["gemma3_text"]


class TestGPTNeoX(ArchitectureConformance):
    config = CONFIGS["gpt_neox"]


class TestGPTNeoXSequentialResidual(ArchitectureConformance):
    config = CONFIGS["gpt_neox"] | {"use_parallel_residual": False}


class TestOPT(ArchitectureConformance):
    config = CONFIGS["opt"]


class TestOPTWithProjections(ArchitectureConformance):
    """The 350M model: embeddings narrower than the decoder, norms that follow."""

    config = CONFIGS["opt"] | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}


class TestMixtral(ArchitectureConformance):
    config = CONFIGS["mixtral"]


class TestQwen3Moe(ArchitectureConformance):
    config = CONFIGS["qwen3_moe"]

    def check_subnet(self, subnet: PreTrainedModel, kept: tuple[int, ...]) -> None:
        assert subnet.config.intermediate_size == self.config["intermediate_size"]  # of layers that it has not

    def test_layers_of_another_kind_are_refused(self) -> None:
        model = random_model(self.config | {"mlp_only_layers": [1]})
        with pytest.raises(ArchitectureError, match="experts in every layer"):
            random_strategy(model)


def test_every_built_in_architecture_is_tested_here() -> None:
    served = {model_type for adapter in amoeba_architectures() for model_type in adapter.model_types}
    tests = [each for name, each in globals().items() if name.startswith("Test")]
    tested = {each.config["model_type"] for each in tests}
    assert tested == served == set(CONFIGS)
