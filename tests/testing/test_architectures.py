"""Every registered architecture, in the suite that a stranger's adapter can subclass: one matrix over the registry.

An architecture that is registered is tested as soon as ``support/architectures.py`` has a tiny configuration of it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.plugins.manager import collected
from amoeba_plugin.testing.architectures import ArchitectureConformance
from amoeba_plugin.testing.random_models import WIDTHS, random_model, random_strategy
from support.architectures import CONFIGS, MULTIPLIERS, VARIANTS
from support.models import logits

REGISTERED = collected(
    "architecture",
    "amoeba_architectures",
    lambda adapters: {model_type: adapter for adapter in adapters for model_type in adapter.model_types},
)


class TestArchitectures(ArchitectureConformance):
    """All tests of the suite, of every model type that is registered and of the variants that compute otherwise."""

    @pytest.fixture(autouse=True, params=[*sorted(REGISTERED), *VARIANTS])
    def _architecture(self, request: pytest.FixtureRequest) -> None:
        found = (CONFIGS | VARIANTS).get(request.param)
        if found is None:
            pytest.fail(
                f"{request.param} is registered as an architecture, and nothing tests it: add a tiny configuration of "
                "it to CONFIGS in tests/support/architectures.py"
            )
        self.config = found

    def check_subnet(self, subnet: PreTrainedModel, kept: tuple[int, ...]) -> None:
        for name, value in self.config.items():
            if isinstance(value, list):  # one value per layer
                assert getattr(subnet.config, name) == [value[index] for index in kept], name
            if name in MULTIPLIERS:
                assert getattr(subnet.config, name) == value, name


def test_every_tiny_configuration_is_of_a_registered_architecture() -> None:
    assert set(CONFIGS) <= set(REGISTERED)
    assert {config["model_type"] for config in VARIANTS.values()} <= set(REGISTERED)


def test_olmo2_at_a_narrow_shape_normalises_over_the_channels_it_keeps() -> None:
    """By hand: Olmo2ForCausalLM of that size, filled from the untouched model by index."""
    whole, width = random_model(CONFIGS["olmo2"]), WIDTHS[1]
    strategy = random_strategy(whole)
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 48}
    subnet = random_model(CONFIGS["olmo2"] | sizes)
    subnet.load_state_dict({
        name: by_hand(name, tensor, strategy.width.order) for name, tensor in whole.state_dict().items()
    })  # fmt: skip
    expected = logits(subnet)
    with ElasticModel(whole, strategy).active(f"4x{width}") as model:
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


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


def test_rotary_factors_of_a_long_context_keep_phi3_s_attention_whole() -> None:
    factors = [1.0 + index for index in range(6)]  # hidden 96 / 8 heads = 12 channels, which rotate in pairs
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    model = random_model(CONFIGS["phi3"] | {"head_dim": 12, "rope_parameters": rope})
    adapter = architecture_for("phi3")
    subnet = adapter.subnet_config(model.config, (1, 3), {"attention": 4, "mlp": 32})
    assert (subnet.num_hidden_layers, subnet.intermediate_size) == (2, 32)
    with pytest.raises(ArchitectureError, match=r"round_to: \{attention: 96\}"):
        adapter.subnet_config(model.config, (1, 3), {"attention": 3, "mlp": 32})


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_heads_that_do_not_divide_the_hidden_size_are_refused_with_those_that_do(model_type: str) -> None:
    model = random_model(CONFIGS[model_type] | {"hidden_size": 64})
    elastic = ElasticModel(model, random_strategy(model))
    with pytest.raises(ArchitectureError, match="with 6 heads on hidden size 64: .* possible are 2, 4, 8"):
        extract(elastic, "4x3/4")


def test_the_dense_size_of_a_model_of_experts_stays_as_it_is_written() -> None:
    """Of layers that it has not."""
    model = random_model(CONFIGS["qwen3_moe"])
    subnet = extract(ElasticModel(model, random_strategy(model)), "3x1/2")
    assert subnet.config.intermediate_size == CONFIGS["qwen3_moe"]["intermediate_size"]


def test_a_model_some_of_whose_layers_have_no_experts_is_refused() -> None:
    model = random_model(CONFIGS["qwen3_moe"] | {"mlp_only_layers": [1]})
    with pytest.raises(ArchitectureError, match="experts in every layer"):
        random_strategy(model)
