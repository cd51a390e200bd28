"""Experts: what is collected and ranked per expert, against loops over tokens; what they cannot do is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import pytest
import torch
from torch.nn import functional

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy
from amoeba_plugin.errors import ArchitectureError, ShapeError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.registry import importance_named
from amoeba_plugin.selection.width.ranking import coupled_parameters, rank_group, rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from amoeba_plugin.testing.random_models import KEPT, random_model, random_strategy
from support.architectures import CONFIGS

TYPES = ["mixtral", "qwen3_moe"]


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids}]


@pytest.mark.parametrize("model_type", TYPES)
def test_statistics_are_those_of_the_tokens_that_chose_the_expert(model_type: str) -> None:
    model, seen = random_model(CONFIGS[model_type]), []
    experts = model.model.layers[2].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    (batch,) = batches()
    with torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    states, chosen, _ = seen[0]
    stats = collect_statistics(model, architecture_for(model_type), [batch], progress=False)
    for expert in range(model.config.num_experts):
        rows = []
        for token in range(len(states)):
            if expert in chosen[token].tolist() and batch["attention_mask"].flatten()[token]:
                gate, up = (experts.gate_up_proj[expert] @ states[token]).chunk(2)
                rows.append((functional.silu(gate) * up).detach().double())
        found = stats[f"2.mlp.{expert}"]
        assert found.tokens == len(rows) > 1
        torch.testing.assert_close(found.mean, torch.stack(rows).mean(dim=0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.variance, torch.stack(rows).var(dim=0, correction=0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_expert_keeps_its_own_best_neurons(model_type: str) -> None:
    model = random_model(CONFIGS[model_type])
    adapter = architecture_for(model_type)
    widths = [Fraction(1), Fraction(1, 2)]
    strategy = rank_widths(WidthTask(model, adapter, importance_named("magnitude"), widths))
    half = widths[1]
    orders = set()
    for index, layer in enumerate(model.model.layers):
        for expert in range(model.config.num_experts):
            key = f"{index}.mlp.{expert}"
            norms = layer.mlp.experts.down_proj[expert].norm(dim=0)
            assert strategy.order[key].tolist() == norms.argsort(descending=True, stable=True).tolist()
            assert strategy.units[half][key] == len(norms) // 2
            orders.add(tuple(strategy.order[key].tolist()))
    assert len(orders) == 4 * model.config.num_experts


@pytest.mark.parametrize("model_type", [*TYPES, "phi3"])
def test_taylor_sums_over_all_weights_of_a_neuron(model_type: str) -> None:
    """Independent of views: gradient x weight of the whole parameters, added up by hand."""
    model = random_model(CONFIGS[model_type])
    adapter, data = architecture_for(model_type), batches()
    gradients = loss_gradients(model, coupled_parameters(model, adapter), data, progress=False)
    strategy = rank_widths(WidthTask(model, adapter, importance_named("taylor"), [Fraction(1)], gradients=gradients))
    mlp = model.model.layers[1].mlp
    if model_type == "phi3":
        key, up, down = "1.mlp", mlp.gate_up_proj.weight, mlp.down_proj.weight
        up_gradient, down_gradient = gradients["1.mlp.gate_up_proj"], gradients["1.mlp.down_proj"]
    else:
        key, up, down = "1.mlp.2", mlp.experts.gate_up_proj[2], mlp.experts.down_proj[2]
        up_gradient = gradients["1.mlp.experts.gate_up_proj"][2]
        down_gradient = gradients["1.mlp.experts.down_proj"][2]
    rows = (up * up_gradient).abs().sum(dim=1)
    scores = rows[: len(rows) // 2] + rows[len(rows) // 2 :] + (down * down_gradient).abs().sum(dim=0)
    assert len(scores) == len(strategy.order[key]) == (32 if model_type == "qwen3_moe" else 64)
    assert strategy.order[key].tolist() == scores.argsort(descending=True).tolist()


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("model_type", TYPES)
def test_anchors_keep_all_neurons_of_all_experts_and_the_others_make_up_for_them(
    model_type: str, allocation: Literal["uniform", "global"]
) -> None:
    model = random_model(CONFIGS[model_type])
    adapter, half = architecture_for(model_type), Fraction(1, 2)
    task = WidthTask(
        model, adapter, importance_named("magnitude"), [Fraction(1), half], allocation=allocation, anchors=[2]
    )
    strategy = rank_widths(task)
    whole, units = strategy.units[Fraction(1)], strategy.units[half]
    experts = range(model.config.num_experts)
    neurons = whole["2.mlp.0"]
    assert [units[f"2.mlp.{expert}"] for expert in experts] == [neurons] * len(experts)
    assert units["2.attention"] == whole["2.attention"]
    for layer in (0, 1, 3):
        assert len({units[f"{layer}.mlp.{expert}"] for expert in experts}) == 1
    # a third of what the three others have, within half a step of 8 neurons in each
    kept = sum(units[f"{layer}.mlp.0"] for layer in (0, 1, 3))
    if allocation == "uniform":
        assert abs(kept - neurons) <= 3 * 4
    assert kept < 3 * neurons // 2
    elastic = ElasticModel(model, SubnetStrategy(DepthStrategy(KEPT), strategy, model_fingerprint(model, adapter)))
    with elastic.active("4x1/2"), torch.no_grad():
        expected = model(torch.arange(3, 13)[None], use_cache=False).logits
    subnet = extract(elastic, "4x1/2")
    with torch.no_grad():
        found = subnet(torch.arange(3, 13)[None], use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_expert_that_no_token_reached_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(CONFIGS["mixtral"] | {"num_local_experts": 60})
    (batch,) = batches()
    few = {name: value[:1, :4] for name, value in batch.items()}
    collect_statistics(model, architecture_for("mixtral"), [few], progress=False)
    assert "no calibration token reached" in caplog.text
    assert "of 240 experts" in caplog.text


@pytest.mark.parametrize("model_type", TYPES)
def test_a_threshold_over_all_layers_leaves_the_experts_of_a_layer_one_size(model_type: str) -> None:
    """Against a loop that takes the best of what is left, one neuron of every expert of a layer at a time."""
    model = random_model(CONFIGS[model_type])
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):  # one neuron in three of the later layers' is worth more
            layer.mlp.experts.down_proj[:, :, ::3] *= 1 + 5 * index
    adapter, importance = architecture_for(model_type), importance_named("magnitude")
    share = Fraction(1, 2)
    task = WidthTask(model, adapter, importance, [Fraction(1), share], allocation="global")
    strategy = rank_widths(task)
    groups = adapter.channel_groups(model.config)
    values: dict[str, list[float]] = {}
    costs, kept = {}, {}
    for index in range(len(model.model.layers)):
        ranked = [rank_group(task, index, group) for group in groups]
        attention, experts = ranked[0], ranked[1:]
        values[f"{index}.attention"] = sorted(attention.scores.tolist(), reverse=True)
        costs[f"{index}.attention"] = attention.cost
        columns = zip(*(sorted(each.scores.tolist(), reverse=True) for each in experts), strict=True)
        values[f"{index}.mlp"] = [sum(column) / len(experts) for column in columns]
        costs[f"{index}.mlp"] = 3 * 96 * len(experts)
    whole = sum(costs[key] * len(each) for key, each in values.items())
    kept, spent = dict.fromkeys(values, 1), sum(costs.values())
    while True:
        best = max((key for key in values if kept[key] < len(values[key])), key=lambda key: values[key][kept[key]])
        if abs(spent + costs[best] - share * whole) >= abs(spent - share * whole):
            break
        kept[best], spent = kept[best] + 1, spent + costs[best]
    for key, units in strategy.units[share].items():
        wanted = kept[".".join(key.split(".")[:2])]
        # torch's grouped product wants rows of 16 bytes: experts keep the nearest eight
        assert units == (wanted if key.endswith("attention") else max((wanted + 4) // 8 * 8, 8)), key
    assert len({strategy.units[share][f"{index}.mlp.0"] for index in range(4)}) > 1


def test_experts_of_different_sizes_are_refused() -> None:
    model = random_model(CONFIGS["mixtral"])
    strategy = random_strategy(model)
    strategy.width.units[Fraction(1, 2)]["1.mlp.0"] -= 1
    elastic = ElasticModel(model, strategy)
    with pytest.raises(ShapeError, match="31, 32 neurons"):
        elastic.set_shape("4x1/2")


def test_experts_have_no_place_for_compensation() -> None:
    model = random_model(CONFIGS["mixtral"])
    with pytest.raises(ArchitectureError, match="bias_compensation: false"):
        ElasticModel(model, random_strategy(model, bias_compensation=True))


def test_a_model_made_elastic_twice_is_refused() -> None:
    model = random_model(CONFIGS["qwen3_moe"])
    first = ElasticModel(model, random_strategy(model))
    for group in first.groups:
        for linear in {*group.producers, group.consumer}:
            linear.restore()
    with pytest.raises(ArchitectureError, match="already elastic"):
        ElasticModel(model, random_strategy(model))


def test_keys_name_the_expert() -> None:
    groups = architecture_for("mixtral").channel_groups(random_model(CONFIGS["mixtral"]).config)
    assert [group_key(3, group) for group in groups] == ["3.attention", "3.mlp.0", "3.mlp.1", "3.mlp.2"]
