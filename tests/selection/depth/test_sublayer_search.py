"""The search over sublayers against models in which the projections that end them are zero."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import ArtifactError, RecipeError
from amoeba_plugin.models.kept import PARTS, kept_without, write_kept
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.selection.depth import runner
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.depth.lockstep_contract import Contract, check_contract
from amoeba_plugin.selection.depth.steps import WHOLE, Removed
from amoeba_plugin.selection.depth.task import DepthTask, SearchOptions
from amoeba_plugin.selection.objectives import PerTokenLoss
from amoeba_plugin.selection.registry import depth_selector_named
from amoeba_plugin.testing.random_models import random_model
from support.deleted_layers import plain_loss, recurrence
from support.depth_search import searched
from support.forked import forked
from support.sublayers import CASES, zeroed

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]
SETS = [Removed({1}), Removed({0, 1, 6}), WHOLE, Removed({2, 3, 4}), Removed({0}), Removed({0, 2, 5}), Removed({7})]


def search(model: PreTrainedModel, batches: list[Batch], **options: Any) -> DepthStrategy:
    fields = {"min_depth": 2, "granularity": "sublayer", "progress": False} | options
    return searched(model, architecture_for(model.config.model_type), PerTokenLoss(), batches, **fields)


def loss_without(model: PreTrainedModel, removed: Removed, batches: list[Batch]) -> float:
    kept = write_kept(*kept_without(len(model.get_decoder().layers), removed, sublayers=True))
    return plain_loss(zeroed(model, kept), batches)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_search_is_the_recurrence_over_sublayers_that_end_in_zeros(
    tiny_model: TinyModel, random_batches: RandomBatches, model_type: str
) -> None:
    model, batches = tiny_model(model_type, seed=3), random_batches(2, 2, 14, lengths=(14, 9))
    found = search(model, batches)

    def scored(removed: Removed) -> tuple[float, float]:
        loss = loss_without(model, removed, batches)
        return loss, loss

    wanted = recurrence(6, 4, scored)
    assert found.search["lockstep"]
    assert list(found.kept) == list(found.metric) == [4, 3.5, 3, 2.5, 2]
    for count, (removed, (loss, _)) in wanted.items():
        layers, lost = kept_without(4, removed, sublayers=True)
        assert found.listed(4 - count / 2) == write_kept(layers, lost)
        assert found.metric[4 - count / 2] == pytest.approx(loss, rel=1e-5)


def test_a_wide_beam_finds_the_best_of_all_sets_of_sublayers(
    tiny_model: TinyModel, random_batches: RandomBatches
) -> None:
    model, batches = tiny_model("llama", seed=1), random_batches(1, 2, 12)
    found = search(model, batches, beam=10**6, keep_last=0)
    for count in range(1, 5):
        losses = {
            removed: loss_without(model, Removed(removed), batches)
            for removed in itertools.combinations(range(8), count)
        }
        best = min(losses, key=losses.__getitem__)
        assert found.listed(4 - count / 2) == write_kept(*kept_without(4, best, sublayers=True))
        assert found.metric[4 - count / 2] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_in_lockstep_sublayers_score_as_if_they_ended_in_zeros(random_batches: RandomBatches, case: str) -> None:
    model, objective = random_model(CASES[case]), PerTokenLoss()
    batches = [*random_batches(2, 3, 14, lengths=(14, 9, 4)), *random_batches(1, 1, 5, seed=1)]
    adapter = architecture_for(model.config.model_type)
    wanted = [loss_without(model, removed, batches) for removed in SETS]
    keys, config = [name for name, _ in model.named_modules()], model.config.to_dict()
    stand_ins = StandIns(adapter.sublayers(model.config), tuple(adapter.layers(model)))
    with evaluating(model):
        contract = check_contract(model, adapter, batches, stand_ins)
        in_sequence = case not in ("gpt_neox", "opt, norms behind")
        assert (contract.broken is None) == in_sequence
        if in_sequence:
            with Lockstep.of(model, adapter, batches, 8, 2**30, stand_ins=stand_ins) as trial:
                rows = trial.observe(objective, SETS)
                assert [objective.score(each).value for each in rows] == pytest.approx(wanted, rel=1e-5)
    found = search(model, batches, exchanges=1)
    assert found.search["lockstep"] == in_sequence
    assert [name for name, _ in model.named_modules()] == keys
    assert model.config.to_dict() == config
    for number, value in found.metric.items():
        assert value == pytest.approx(plain_loss(zeroed(model, found.listed(number)), batches), rel=1e-5)


def test_lockstep_finds_what_one_subnet_after_another_finds(
    tiny_model: TinyModel,
    random_batches: RandomBatches,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batches = tiny_model("qwen3", layers=5), random_batches(2, 2, 10, lengths=(10, 6))
    together = search(model, batches, beam=2, exchanges=1)
    monkeypatch.setattr(runner, "check_contract", lambda *args: Contract("for comparison"))
    with caplog.at_level(logging.WARNING):
        apart = search(model, batches, beam=2, exchanges=1)
    assert (apart.kept, apart.lost) == (together.kept, together.lost)
    assert apart.metric == pytest.approx(together.metric, rel=1e-5)
    assert together.search["layer_forwards"] < apart.search["layer_forwards"] / 1.5
    assert "is run from its embeddings" in caplog.text


def test_sublayers_are_never_worse_than_layers_where_every_set_is_tried(
    tiny_model: TinyModel, random_batches: RandomBatches
) -> None:
    model, batches = tiny_model("llama", seed=4), random_batches(1, 2, 12)
    halves, wholes = search(model, batches, beam=10**6), search(model, batches, beam=10**6, granularity="layer")
    assert set(wholes.kept) < set(halves.kept)
    for number, value in wholes.metric.items():
        assert halves.metric[number] <= value * (1 + 1e-5)
    assert not wholes.lost


def test_a_search_over_sublayers_is_resumed_beside_one_over_layers(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_model("llama"), random_batches(2)
    wanted = search(model, batches)
    search(model, batches, granularity="layer", resume_dir=tmp_path)
    observe, left = PerTokenLoss.observe, 25

    def stopping(self: PerTokenLoss, *args: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return observe(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PerTokenLoss, "observe", stopping)
        search(model, batches, resume_dir=tmp_path)
    resumed = search(model, batches, resume_dir=tmp_path)
    assert resumed == wanted
    assert 0 < resumed.search["measured"] < wanted.search["measured"]
    assert search(model, batches, resume_dir=tmp_path).search["measured"] == 0
    with pytest.raises(ArtifactError, match="data is"):
        search(model, random_batches(2, seed=9), resume_dir=tmp_path)


def search_on_rank(rank: int, model: PreTrainedModel, batches: list[Batch], directory: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    found = search(model, batches)
    (directory / f"{rank}.json").write_text(json.dumps([found.table, list(found.metric.values())]))
    distributed.destroy_process_group()


def test_two_ranks_find_what_one_process_finds(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path
) -> None:
    model, batches = tiny_model("llama"), random_batches(3, lengths=(12, 7))
    wanted = search(model, batches)
    ranks = [forked(search_on_rank, rank, model, batches, tmp_path) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[0] == wanted.table
    assert first[1] == pytest.approx(list(wanted.metric.values()), rel=1e-9)


def test_an_offloaded_model_fetches_each_sublayer_once_a_step(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_model("llama", layers=3), random_batches(2)
    wanted = search(model, batches)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    monkeypatch.setattr(runner, "check_contract", lambda *args: Contract(None))  # it fetches too
    fetched, steps = Counter[nn.Module](), []
    fetch, observe = AlignDevicesHook.pre_forward, Lockstep.observe

    def counted(hook: AlignDevicesHook, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fetched[module] += hook.offload
        return fetch(hook, module, *args, **kwargs)

    def step(self: Lockstep, *args: Any) -> list[Tensor]:
        fetched.clear()
        observed = observe(self, *args)
        steps.append([fetched[each] for layer in layers for each in (layer.self_attn.o_proj, layer.mlp.down_proj)])
        return observed

    layers = list(model.model.layers)
    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    monkeypatch.setattr(Lockstep, "observe", step)
    found = search(model, batches)
    # the whole model; then what is behind the sublayer that all subnets of a step lack
    assert steps == [[1] * 6, [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert (found.kept, found.lost) == (wanted.kept, wanted.lost)
    assert found.metric == pytest.approx(wanted.metric, rel=1e-5)


def test_near_ties_name_sublayers(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # both attentions do nothing
        for layer in model.model.layers[:2]:
            layer.self_attn.o_proj.weight.zero_()
    ties = search(model, random_batches(1)).search["near_ties"]
    assert ties
    names = {name for tie in ties for side in tie.values() for name in side}
    assert {"0.attention", "1.attention"} <= names <= {f"{layer}.{part}" for layer in range(4) for part in PARTS}
    assert all(set(tie["preferred"]) ^ set(tie["other"]) == {"0.attention", "1.attention"} for tie in ties)


def test_published_selectors_have_no_sublayers(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    assert "granularity" in depth_selector_named("dynamic_program").options
    assert "granularity" not in depth_selector_named("block_influence").options
    model = tiny_model("llama")
    task = DepthTask(
        model, architecture_for("llama"), PerTokenLoss(), random_batches(1), min_depth=3, progress=False,
        options=SearchOptions(granularity="sublayer"),
    )  # fmt: skip
    assert set(depth_selector_named("dynamic_program").select(task).kept) == {4, 3.5, 3}
    with pytest.raises(RecipeError, match="min_depth 4 is impossible"):
        search(model, random_batches(1), min_depth=4)
