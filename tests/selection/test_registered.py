"""What all registered importances, objectives, repairs, depth selectors and sensitivities must do: one matrix.

To register one is all that it takes to have it tested here, a plugin's too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.plugins.manager import collected
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.runtime.state_store import StateStore
from amoeba_plugin.selection.activation_stats import ActivationStats, collect_statistics
from amoeba_plugin.selection.depth.task import DepthSelector, DepthTask, SearchOptions
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.importance import (
    AnyImportance,
    CoupledWeights,
    GroupImportance,
    Importance,
    MomentImportance,
)
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.layerwise.compress import Compressor, input_norms
from amoeba_plugin.selection.layerwise.options import Grid, Option
from amoeba_plugin.selection.layerwise.task import DenseStates, Scores, Sensitivity, SensitivityTask
from amoeba_plugin.selection.layerwise.units import layer_units
from amoeba_plugin.selection.objectives import Objective, better
from amoeba_plugin.selection.registry import objective_named
from amoeba_plugin.selection.repair.collect import collect_moments
from amoeba_plugin.selection.repair.moments import ChannelMoments, Moments
from amoeba_plugin.selection.repair.width import Repair
from amoeba_plugin.selection.width.ranking import coupled_parameters, rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from support.batches import make_questions, make_random_batches
from support.models import logits, make_tiny_model

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]

IMPORTANCES: dict[str, AnyImportance] = collected("importance", "amoeba_importances")
OBJECTIVES: dict[str, Objective] = collected("objective", "amoeba_objectives")
SELECTORS: dict[str, DepthSelector] = collected("depth selector", "amoeba_depth_selectors")
REPAIRS: dict[str, Repair] = collected("repair", "amoeba_repairs")
SENSITIVITIES: dict[str, Sensitivity] = collected("sensitivity", "amoeba_sensitivities")
LLAMA = architecture_for("llama")
WIDTHS = [Fraction(1), Fraction(3, 4), Fraction(1, 2)]
LAYERS, MIN_DEPTH, KEEP_LAST = 9, 7, 3  # what the selectors that protect the first four and the last two can do

every_importance = pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES)
every_repair = pytest.mark.parametrize("repair", REPAIRS.values(), ids=REPAIRS)
every_sensitivity = pytest.mark.parametrize("sensitivity", SENSITIVITIES.values(), ids=SENSITIVITIES)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
every_selector = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)


def row_by_row(batches: list[Batch]) -> list[Batch]:
    """Cut batches into batches of one row."""
    return [
        {name: column[row : row + 1] for name, column in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]


def all_at_once(batches: list[Batch]) -> list[Batch]:
    """Make one batch of several."""
    return [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}]


# --- repairs


@every_repair
@pytest.mark.parametrize("tokens", [5, 200])
def test_a_repair_is_nearer_to_the_whole_than_the_cut(repair: Repair, tokens: int) -> None:
    """On the rows it saw, fewer than channels or many; and it changes no input."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, moments = torch.randn(4, 12, generator=generator), Moments.empty(12)
    moments.add(rows[::2], held_out=False)
    moments.add(rows[1::2], held_out=True)
    before = weight.clone(), moments.all
    found = repair.columns(weight, moments, [3, 8])
    assert {kept: tuple(each.shape) for kept, each in found.items()} == {3: (4, 3), 8: (4, 8)}
    for kept, each in found.items():
        whole = rows.double() @ weight.double().T
        cut = (whole - rows[:, :kept].double() @ weight[:, :kept].double().T).square().sum()
        assert (whole - rows[:, :kept].double() @ each.T).square().sum() < cut, kept
    assert torch.equal(weight, before[0])
    assert torch.equal(moments.all, before[1])


@every_repair
def test_a_repair_without_data_is_the_cut(repair: Repair) -> None:
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    for kept, each in repair.columns(weight, Moments.empty(12), [3, 8]).items():
        assert torch.equal(each, weight[:, :kept].double())


# --- importances


def calibrated(
    model: PreTrainedModel, importance: AnyImportance, batches: list[Batch]
) -> tuple[dict[str, ActivationStats], dict[str, Tensor]]:
    """Return the statistics and gradients that an importance says it looks at, and no others."""
    if isinstance(importance, MomentImportance):
        return {}, {}
    if isinstance(importance, GroupImportance):
        if not importance.needs_gradients:
            return {}, {}
        return {}, loss_gradients(model, coupled_parameters(model, LLAMA), batches, progress=False)
    return collect_statistics(model, LLAMA, batches, progress=False) if importance.needs_statistics else {}, {}


def moments_of(model: PreTrainedModel, importance: AnyImportance, batches: list[Batch]) -> ChannelMoments:
    """Return the second moments, empty where an importance does not look at them."""
    moments = ChannelMoments(StateStore(float("inf"), Path()))
    if isinstance(importance, MomentImportance):
        collect_moments(LayerRuns.of(model, LLAMA, batches), moments, progress=False)
    return moments


def scores_of(model: PreTrainedModel, importance: AnyImportance, batches: list[Batch]) -> dict[str, Tensor]:
    """Return by group what an importance gives to its channels, or to its units."""
    moments = moments_of(model, importance, batches)
    statistics, gradients = calibrated(model, importance, batches)
    scores = {}
    for index, layer in enumerate(LLAMA.layers(model)):
        for group in LLAMA.channel_groups(model.config):
            key, weight = group_key(index, group), group.consumer.weight(layer).detach()
            if isinstance(importance, GroupImportance):
                axes = (*group.producers, group.consumer)
                weights = {axis: axis.weight(layer).detach() for axis in axes}
                given = {axis: gradients[f"{index}.{axis.path}"] for axis in axes} if gradients else {}
                scores[key] = importance.score(CoupledWeights(group, weights, given))
            elif isinstance(importance, MomentImportance):
                scores[key] = importance.score(weight, moments[key].all, group.consumer.channels_per_unit)
            else:
                scores[key] = importance.score(statistics.get(key) or ActivationStats.empty(group.channels), weight)
    return scores


def ranked(model: PreTrainedModel, importance: AnyImportance, batches: list[Batch], **options: Any) -> WidthStrategy:
    """Rank widths with what an importance says it needs."""
    statistics, gradients = calibrated(model, importance, batches)
    moments = moments_of(model, importance, batches)
    return rank_widths(WidthTask(model, LLAMA, importance, WIDTHS, statistics, gradients, moments=moments, **options))


@every_importance
def test_an_importance_gives_every_channel_or_unit_a_finite_score(
    tiny_model: TinyModel, importance: AnyImportance
) -> None:
    model = tiny_model("llama", layers=2)
    scores = scores_of(model, importance, make_random_batches(lengths=(12, 7)))
    for group in LLAMA.channel_groups(model.config):
        wanted = group.channels if isinstance(importance, Importance) else group.units
        for index in range(2):
            found = scores[group_key(index, group)]
            assert found.shape == (wanted,)
            assert found.dtype == torch.float32
            assert bool(torch.isfinite(found).all())
            assert len(found.unique()) > 1, "it cannot tell them apart"


@every_importance
def test_an_importance_does_not_depend_on_how_data_is_batched(tiny_model: TinyModel, importance: AnyImportance) -> None:
    model, batches = tiny_model("llama", layers=2), make_random_batches(lengths=(12, 7))
    wanted = scores_of(model, importance, batches)
    for cut in (row_by_row(batches), all_at_once(batches)):
        for key, scores in scores_of(model, importance, cut).items():
            torch.testing.assert_close(scores, wanted[key], rtol=1e-3, atol=1e-4 * wanted[key].abs().max().item())


@every_importance
def test_units_whose_weights_are_all_zero_come_last(tiny_model: TinyModel, importance: AnyImportance) -> None:
    model, useless = tiny_model("llama", layers=2), {"attention": 1, "mlp": 77}
    with torch.no_grad():
        for layer in LLAMA.layers(model):
            for group in LLAMA.channel_groups(model.config):
                unit = torch.tensor([useless[group.name]])
                group.consumer.weight(layer)[:, group.consumer.channels(unit)] = 0
                for axis in group.producers:
                    axis.weight(layer)[axis.channels(unit)] = 0
    strategy = ranked(model, importance, make_random_batches(lengths=(12, 7)))
    for key, order in strategy.order.items():
        assert order[-1] == useless[key.partition(".")[2]], key


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@every_importance
def test_an_importance_makes_a_strategy_of_nested_widths_that_run(
    tiny_model: TinyModel, importance: AnyImportance, allocation: str
) -> None:
    model, batches = tiny_model("llama", layers=2), make_random_batches(lengths=(12, 7))
    before = copy.deepcopy(model.state_dict())
    strategy = ranked(model, importance, batches, allocation=allocation)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert strategy.importance == importance.name
    assert list(strategy.units) == WIDTHS
    for key, order in strategy.order.items():
        assert sorted(order.tolist()) == list(range(len(order)))
        assert strategy.units[WIDTHS[0]][key] == len(order)
        assert all(strategy.units[wide][key] >= strategy.units[narrow][key] for wide, narrow in pairwise(WIDTHS))
        assert strategy.units[WIDTHS[-1]][key] >= 1
    whole = logits(model)
    elastic = ElasticModel(model, SubnetStrategy(DepthStrategy.whole(2), strategy, model_fingerprint(model, LLAMA)))
    torch.testing.assert_close(logits(model), whole, atol=1e-4, rtol=0)
    with elastic.active("2x1/2") as narrow:
        found = logits(narrow)
    assert bool(torch.isfinite(found).all())
    assert not torch.allclose(found, whole, atol=1e-3)


@pytest.mark.parametrize(("name", "importance"), IMPORTANCES.items(), ids=IMPORTANCES)
def test_an_importance_says_what_it_is(name: str, importance: AnyImportance) -> None:
    assert importance.name == name
    assert importance.description


# --- objectives


def questions() -> list[Batch]:
    """Return text with everything that an objective may look at: 12 rows of 4 questions."""
    return make_questions(make_random_batches(4, 3, lengths=(12, 12, 9)), choices=3, continuation=4)


@pytest.fixture(scope="module")
def fitted() -> PreTrainedModel:
    """Return a model that has learned the rows of the true answers by heart, and of the others next to nothing."""
    model = make_tiny_model("llama", layers=2)
    (whole,) = all_at_once(questions())
    answers = {name: whole[name][whole["is_answer"] == 1] for name in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(30):
            optimizer.zero_grad()
            loss = (
                model(**answers, use_cache=False).loss
                + 0.3 * model(**{name: whole[name] for name in answers}, use_cache=False).loss
            )
            loss.backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


@every_objective
def test_an_objective_refuses_no_batches(objective: Objective) -> None:
    with pytest.raises(DataError, match=f"objective {objective.name}: there are no batches; give"):
        objective.check([])


@every_objective
def test_an_objective_s_score_of_what_it_observes_is_its_measure(tiny_model: TinyModel, objective: Objective) -> None:
    if not objective.is_separable:
        pytest.skip(f"objective {objective.name} measures as a whole")
    model, batches = tiny_model("llama", layers=2), questions()
    wanted = objective.measure(model, batches)
    with evaluating(model):
        rows = torch.cat([objective.observe(model, batch) for batch in batches])
    assert (len(rows), rows.dim(), rows.dtype, rows.device.type) == (12, 2, torch.float64, "cpu")
    assert objective.score(rows) == wanted
    shuffled = objective.score(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))])
    assert (shuffled.value, shuffled.loss) == pytest.approx((wanted.value, wanted.loss), rel=1e-12)


@every_objective
def test_an_objective_does_not_depend_on_how_data_is_batched(tiny_model: TinyModel, objective: Objective) -> None:
    model = tiny_model("llama", layers=2)
    wanted = objective.measure(model, questions())
    for cut in (row_by_row(questions()), all_at_once(questions())):
        found = objective.measure(model, cut)
        assert (found.value, found.loss) == pytest.approx((wanted.value, wanted.loss), rel=1e-5)


@every_objective
def test_a_damaged_model_scores_worse(fitted: PreTrainedModel, objective: Objective) -> None:
    damaged = copy.deepcopy(fitted)
    with torch.no_grad():
        for layer in damaged.model.layers:
            layer.mlp.down_proj.weight.zero_()
        damaged.lm_head.weight.copy_(damaged.lm_head.weight.roll(1, 0))
    whole, worse = (objective.measure(model, questions()) for model in (fitted, damaged))
    assert better(objective, whole, worse)
    assert not better(objective, worse, whole)
    assert (whole.value > worse.value) == objective.larger_is_better


@every_objective
def test_measuring_changes_nothing(tiny_model: TinyModel, objective: Objective) -> None:
    model, batches = tiny_model("llama", layers=2).train(), questions()
    before, data = copy.deepcopy(model.state_dict()), copy.deepcopy(batches)
    objective.measure(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(
        torch.equal(column, batch[name])
        for batch, was in zip(batches, data, strict=True)
        for name, column in was.items()
    )


@pytest.mark.parametrize(("name", "objective"), OBJECTIVES.items(), ids=OBJECTIVES)
def test_an_objective_says_what_it_is(name: str, objective: Objective) -> None:
    assert objective.name == name
    assert objective.unit
    assert isinstance(objective.larger_is_better, bool)


# --- depth selectors


def selected(
    selector: DepthSelector, model: PreTrainedModel, batches: list[Batch], min_depth: int = MIN_DEPTH,
    keep_last: int = KEEP_LAST,
) -> DepthStrategy:  # fmt: skip
    task = DepthTask(model, LLAMA, objective_named("loss"), batches, min_depth, keep_last, progress=False)
    return selector.select(task)


@every_selector
def test_a_selector_keeps_the_last_layers_at_every_depth_and_leaves_the_model_as_it_was(
    tiny_model: TinyModel, selector: DepthSelector
) -> None:
    model = tiny_model("llama", layers=LAYERS).train()
    before, layers, config = copy.deepcopy(model.state_dict()), list(model.model.layers), model.config.to_dict()
    found = selected(selector, model, make_random_batches(1))
    assert list(found.kept) == list(range(LAYERS, MIN_DEPTH - 1, -1))
    for depth, kept in found.kept.items():
        assert len(kept) == depth
        assert list(kept) == sorted(set(kept))
        assert set(kept) >= set(range(LAYERS - KEEP_LAST, LAYERS))
    assert found.selector == selector.name
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(now is then for now, then in zip(model.model.layers, layers, strict=True))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    assert model.config.to_dict() == config


@every_selector
def test_a_selector_s_every_depth_runs(tiny_model: TinyModel, selector: DepthSelector) -> None:
    model = tiny_model("llama", layers=LAYERS)
    found = selected(selector, model, make_random_batches(1))
    whole = logits(model)
    elastic = ElasticModel(model, SubnetStrategy(found, WidthStrategy.whole(), model_fingerprint(model, LLAMA)))
    assert torch.equal(logits(model), whole)
    for depth in list(found.kept)[1:]:
        with elastic.active(f"{depth}x1") as subnet:
            assert not torch.allclose(logits(subnet), whole, atol=1e-3)


@every_selector
def test_a_selector_chooses_the_same_however_data_is_batched(tiny_model: TinyModel, selector: DepthSelector) -> None:
    model, batches = tiny_model("llama", layers=LAYERS), make_random_batches(2, lengths=(12, 7))
    wanted = selected(selector, model, batches)
    for cut in (row_by_row(batches), all_at_once(batches)):
        assert selected(selector, model, cut).kept == wanted.kept


@pytest.mark.parametrize(
    ("min_depth", "keep_last", "message"),
    [
        (9, 1, r"min_depth 9 is impossible: the model has 9 layers; take 1\.\.8"),
        (7, 8, r"keep_last 8 is impossible with min_depth 7: .* take 0\.\.7"),
    ],
)
@every_selector
def test_a_selector_refuses_impossible_depths(
    tiny_model: TinyModel, selector: DepthSelector, min_depth: int, keep_last: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        selected(selector, tiny_model("llama", layers=LAYERS), make_random_batches(1), min_depth, keep_last)


@pytest.mark.parametrize(("name", "selector"), SELECTORS.items(), ids=SELECTORS)
def test_a_selector_says_what_it_is_and_what_it_looks_at(name: str, selector: DepthSelector) -> None:
    assert selector.name == name
    assert selector.description
    assert set(selector.options) <= {field.name for field in dataclasses.fields(SearchOptions)}


# --- sensitivities

LONE_OPTIONS = [Option(2), Option(4), Option(8), Option(16, 0.3), Option(16, 0.6)]


def scored(sensitivity: Sensitivity, model: PreTrainedModel, batches: list[Batch]) -> Scores:
    units = layer_units(model, LLAMA)
    compressor = Compressor(model, Grid(32), input_norms(model, units, batches))
    with DenseStates.of(LayerRuns.of(model, LLAMA, batches)) as dense:
        task = SensitivityTask(dense, batches, units, LONE_OPTIONS, compressor, progress=False)
        return sensitivity.measure(task)


@every_sensitivity
def test_a_sensitivity_scores_every_unit_at_every_option_and_leaves_the_model(sensitivity: Sensitivity) -> None:
    model = make_tiny_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scores = scored(sensitivity, model, make_random_batches(2))
    assert set(scores) == {(unit.name, option) for unit in layer_units(model, LLAMA) for option in LONE_OPTIONS}
    assert all(score >= 0 for score in scores.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@every_sensitivity
def test_more_bits_and_fewer_zeros_lose_less_of_a_model(sensitivity: Sensitivity) -> None:
    scores = scored(sensitivity, make_tiny_model("llama"), make_random_batches(3))
    total = {option: sum(score for (_, each), score in scores.items() if each == option) for option in LONE_OPTIONS}
    assert total[Option(2)] > total[Option(4)] > total[Option(8)] > 0
    assert total[Option(16, 0.6)] > total[Option(16, 0.3)] > 0
