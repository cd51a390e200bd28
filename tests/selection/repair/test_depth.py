"""Removed layers folded into the one in front of them, against regressions on states that the host itself computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import repair_named
from amoeba_plugin.selection.repair.depth import RIDGE, Folds, fold_depths, removed_runs
from amoeba_plugin.selection.repair.width import repair_shapes
from amoeba_plugin.testing.random_models import KEPT, random_model, random_strategy
from support.architectures import CONFIGS
from support.models import logits, logits_at, make_tiny_model, require_close
from support.packed_linears import pack

TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[dict[str, Tensor]]]


def folded(model: PreTrainedModel, kept: dict[float, tuple[int, ...]], batches: list[dict[str, Tensor]]) -> Folds:
    runs = LayerRuns.of(model, architecture_for(model.config.model_type), batches)
    return fold_depths(runs, DepthStrategy(kept), progress=False)


def states_of(model: PreTrainedModel, batch: dict[str, Tensor], front: int) -> tuple[Tensor, list[Tensor]]:
    """Return the neurons of one layer, and the states before every layer and behind the last one; padding left out."""
    seen: list[Tensor] = []
    handle = model.model.layers[front].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    behind: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, args, output: behind.append(output)) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for each in (handle, *hooks):
        each.remove()
    present = batch["attention_mask"].bool()
    return seen[0][present].double(), [each[present].double() for each in behind]


def test_every_run_has_the_weighted_regression_behind_what_is_repaired_below(
    tiny_model: TinyModel, random_batches: RandomBatches
) -> None:
    """In the host's own model: regress, add to the weight, take the layers out, and go on above."""
    model, (batch,) = tiny_model("llama", layers=8), random_batches(1, rows=30, lengths=(12, 7) * 15)
    kept = (1, 2, 4, 7)  # 0 has nothing in front of it; 3, and 5 and 6, have
    folds = folded(model, {8: tuple(range(8)), 4: kept}, [batch])[4]
    assert sorted(folds) == ["2.mlp", "4.mlp"]
    own = copy.deepcopy(model)
    layers = list(own.model.layers)
    own.model.layers = nn.ModuleList(layers[1:])
    for front, gone in ((2, [3]), (4, [5, 6])):
        here = [layer for layer in own.model.layers]
        position = here.index(layers[front])
        neurons, behind = states_of(own, batch, position)
        states, added = behind[position], behind[position + len(gone)] - behind[position]
        weights = 1 / states.norm(dim=1, keepdim=True)
        rows = neurons * weights
        scale = (RIDGE * rows.square().sum(dim=0).mean()).sqrt()
        extended = torch.cat([rows, scale * torch.eye(rows.shape[1]).double()])
        change = torch.linalg.lstsq(extended, torch.cat([added * weights, torch.zeros(rows.shape[1], 64)])).solution.T
        with torch.no_grad():
            layers[front].mlp.down_proj.weight.add_(change.float())
        require_close(folds[f"{front}.mlp"], layers[front].mlp.down_proj.weight.detach(), 1e-4)
        own.model.layers = nn.ModuleList([layer for layer in here if layer not in [layers[index] for index in gone]])


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_depths_come_nearer_to_the_whole_model_or_stay_as_they_are(
    model_type: str, random_batches: RandomBatches
) -> None:
    model, batches = random_model(CONFIGS[model_type]), random_batches(3, rows=4, positions=32)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    folds, strategy = folded(model, KEPT, batches), random_strategy(model)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    if architecture_for(model_type).residual_share(model.config) is None:
        assert model_type in ("gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe")
        assert not folds
        return
    assert {depth: sorted(held) for depth, held in folds.items()} == {3: ["0.mlp"], 2: ["1.mlp"]}
    runs, tokens = LayerRuns.of(model, architecture_for(model_type), batches), batches[0]["input_ids"]
    both = repair_shapes(runs, strategy.width, repair_named("least_squares"), folds, progress=False)
    depths = repair_shapes(runs, strategy.width, None, folds, progress=False)
    assert (both.method, depths.method) == ("least_squares", "depth")
    models = [copy.deepcopy(model) for _ in range(3)]
    repaired, folded_only, cut = (
        ElasticModel(each, replace(strategy, repairs=repairs))
        for each, repairs in zip(models, (both, depths, strategy.repairs), strict=True)
    )
    whole = logits_at(cut, "4x1", tokens)
    for elastic in (repaired, folded_only):
        require_close(logits_at(elastic, "4x1", tokens), whole)
        require_close(logits_at(elastic, "3x1", tokens), logits_at(repaired, "3x1", tokens))
        distance = (logits_at(elastic, "3x1", tokens) - whole).norm()
        assert distance < 0.95 * (logits_at(cut, "3x1", tokens) - whole).norm()
    assert not torch.equal(logits_at(folded_only, "3x1/2", tokens), logits_at(cut, "3x1/2", tokens))
    distance = (logits_at(repaired, "3x1/2", tokens) - whole).norm()
    assert distance < 0.95 * (logits_at(cut, "3x1/2", tokens) - whole).norm()


def test_a_folded_shape_is_the_model_without_these_layers(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    """The weight goes into a plain model by hand, whose layers are taken out of the list."""
    model, batches = tiny_model("llama"), random_batches(2)
    folds, strategy = folded(model, KEPT, batches), random_strategy(model)
    repairs = repair_shapes(LayerRuns.of(model, architecture_for("llama"), batches), strategy.width, None, folds)
    by_hand = copy.deepcopy(model)
    by_hand.model.layers[0].mlp.down_proj.weight.data.copy_(folds[3]["0.mlp"])
    by_hand.model.layers = nn.ModuleList([by_hand.model.layers[index] for index in KEPT[3]])
    by_hand.config.num_hidden_layers = 3
    elastic = ElasticModel(model, replace(strategy, repairs=repairs))
    tokens = batches[0]["input_ids"]
    require_close(logits_at(elastic, "3x1", tokens), logits(by_hand, tokens))


def test_layers_at_the_end_are_folded_too(random_batches: RandomBatches) -> None:
    model, batches = make_tiny_model("llama"), random_batches(2)
    assert removed_runs((0, 1), 4) == {1: range(2, 4)}
    assert list(folded(model, {4: (0, 1, 2, 3), 2: (0, 1)}, batches)[2]) == ["1.mlp"]


def test_what_cannot_be_folded_is_left(random_batches: RandomBatches) -> None:
    batches = random_batches(2)
    assert not folded(pack(make_tiny_model("llama")), KEPT, batches)
    model = make_tiny_model("llama")
    adapter = architecture_for("llama")
    depth = DepthStrategy({4: (0, 1, 2, 3), 2.5: (0, 2, 3)}, lost={2.5: {2: "mlp"}})
    assert not fold_depths(LayerRuns.of(model, adapter, batches), depth, progress=False)
    assert group_key(0, adapter.channel_groups(model.config)[1]) == "0.mlp"
