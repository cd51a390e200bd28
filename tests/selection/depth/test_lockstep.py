"""Layers run one at a time for many subnets, against models from which the layers are really deleted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import SubnetStrategy, WidthStrategy
from amoeba_plugin.errors import DataError
from amoeba_plugin.models.architectures.llama import LlamaFamily
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.runtime.state_store import StateStore
from amoeba_plugin.selection.depth import lockstep, runner
from amoeba_plugin.selection.depth.dynamic_program import Search
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.depth.lockstep_contract import check_contract
from amoeba_plugin.selection.depth.steps import WHOLE, Removed
from amoeba_plugin.selection.depth.walk import walk
from amoeba_plugin.selection.objectives import Objective, PerTokenLoss, Score
from support.deleted_layers import SLIDING, deleted
from support.depth_search import searched

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]
ARCHITECTURES = {
    "llama": {},
    "qwen2": SLIDING,
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "granite": {"embedding_multiplier": 3.0},
    "opt": {"ffn_dim": 64},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
}
SETS = [Removed({1}), Removed({0, 1, 4}), WHOLE, Removed({3}), Removed({1, 3}), Removed({0}), Removed({2, 3, 4})]


class AnyDecoder(LlamaFamily):
    """Knows where the layers are."""

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.get_decoder()


def plain(model: PreTrainedModel, sets: Sequence[Removed], batches: Sequence[Batch]) -> list[float]:
    return [PerTokenLoss().measure(deleted(model, removed), batches).value for removed in sets]


def scores(lockstep: Lockstep, sets: Sequence[Removed]) -> list[float]:
    objective = PerTokenLoss()
    return [objective.score(rows).value for rows in lockstep.observe(objective, sets)]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_subnet_scores_as_if_its_layers_had_been_deleted(
    tiny_model: TinyModel, random_batches: RandomBatches, model_type: str
) -> None:
    model = tiny_model(model_type, layers=6, **ARCHITECTURES[model_type])
    batches = [*random_batches(2, 3, 14, lengths=(14, 9, 4)), *random_batches(1, 1, 5, seed=1)]
    wanted = plain(model, SETS, batches)
    with evaluating(model):
        contract = check_contract(model, AnyDecoder(), batches)
        assert contract.broken is None
        for tokens, calls in ((10**6, None), (1, "one state each")):
            with Lockstep.of(model, AnyDecoder(), batches, 5, 2**30, tokens_at_once=tokens) as trial:
                assert scores(trial, SETS) == pytest.approx(wanted, rel=1e-5)
                first = trial.layer_forwards
                assert scores(trial, SETS[:2]) == pytest.approx(wanted[:2], rel=1e-5)  # with what is cached
                assert (trial.layer_calls == trial.layer_forwards) == (calls is not None)
                assert first == 3 * distinct_states([SETS], 6)
                assert trial.layer_forwards == first + 3 * distinct_states([SETS[:2]], 6)


def distinct_states(steps: Sequence[Sequence[Removed]], layers: int) -> int:
    """Count the pairs of a layer and what was removed before it; the whole model's only where it is asked for."""
    return sum(
        len(
            {
                (layer, tuple(index for index in sorted(removed) if index < layer))
                for removed in step
                for layer in range(layers)
                if layer not in removed and (WHOLE in step or layer > min(removed))
            }
        )
        for step in steps
    )


@pytest.mark.parametrize(("beam", "exchanges"), [(1, 0), (1, 2), (3, 1)])
def test_the_search_runs_every_shared_state_once_and_no_other(
    tiny_model: TinyModel,
    random_batches: RandomBatches,
    monkeypatch: pytest.MonkeyPatch,
    beam: int,
    exchanges: int,
) -> None:
    layers, steps, rows, calls = 7, [], 0, 0
    model, batches = tiny_model("llama", layers=layers), random_batches(2, 2, 10, lengths=(10, 6))
    options = {"min_depth": 3, "beam": beam, "exchanges": exchanges, "progress": False}
    observe = Lockstep.observe

    def noted(self: Lockstep, objective: Objective, sets: Sequence[Removed], *args: Any) -> list[Tensor]:
        steps.append(list(sets))
        return observe(self, objective, sets, *args)

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal rows, calls
        rows, calls = rows + len(args[0]), calls + 1

    contract = check_contract(model, AnyDecoder(), batches)
    monkeypatch.setattr(runner, "check_contract", lambda *args: contract)  # it runs layers too
    monkeypatch.setattr(Lockstep, "observe", noted)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(count)
    found = searched(model, AnyDecoder(), PerTokenLoss(), batches, **options)
    assert found.search["lockstep"]
    assert len(batches) * distinct_states(steps, layers) == rows / 2 == found.search["layer_forwards"]
    assert calls == found.search["layer_calls"] < rows / 2
    assert found.search["measured"] == sum(map(len, steps)) == len({removed for step in steps for removed in step})
    monkeypatch.setattr(runner, "check_contract", lambda *args: runner.Contract("for comparison"))
    one_by_one = searched(model, AnyDecoder(), PerTokenLoss(), batches, **options)
    assert one_by_one.kept == found.kept
    assert one_by_one.metric == pytest.approx(found.metric, rel=1e-5)
    assert not one_by_one.search["lockstep"]


@pytest.mark.parametrize("seed", range(3))
def test_the_paper_s_setting_takes_a_third_of_the_layer_forwards(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    harm = torch.rand(31, generator=generator).tolist()
    steps: list[list[Removed]] = [[WHOLE]]

    def evaluate(sets: Sequence[Removed]) -> list[Score]:
        steps.append(list(sets))
        noise = torch.rand(len(sets), generator=generator).tolist()
        return [
            Score(sum(harm[index] for index in removed) + draw, 0.0) for removed, draw in zip(sets, noise, strict=True)
        ]

    Search(evaluate, PerTokenLoss()).shrink(31, 12)
    assert sum(32 - len(removed) for step in steps[1:] for removed in step) == 7946  # from the embeddings
    walked = sum(len(visit.through) for step in steps for visit in walk(step, 32))
    assert walked == distinct_states(steps, 32)
    assert walked * 3 <= 7946


def test_states_beyond_the_budget_go_to_disk_and_come_back(
    tiny_model: TinyModel, random_batches: RandomBatches
) -> None:
    model, batches = tiny_model("qwen3", layers=6), random_batches(3, 2, 14, lengths=(14, 9))
    found = [
        searched(model, AnyDecoder(), PerTokenLoss(), batches, min_depth=2, exchanges=1, cache_gib=gib, progress=False)
        for gib in (4.0, 1e-9)
    ]
    assert found[0] == found[1]
    assert "states on disk" not in found[0].search["peak_bytes"]
    assert found[1].search["peak_bytes"]["states on disk"] > 14 * 64 * 4
    assert "states on cpu" not in found[1].search["peak_bytes"]


def test_a_store_keeps_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {number: torch.full((4,), float(number), dtype=torch.bfloat16) for number in range(5)}  # 8 bytes each
    with StateStore.of(budget=16) as store:
        for number, each in states.items():
            store[number] = each
        assert store.peak == {"cpu": 16, "disk": 24}
        assert len(list(store.folder.iterdir())) == 3
        assert all(torch.equal(store[number], each) for number, each in states.items())
        store.rename(4, "four")
        assert torch.equal(store["four"], states[4])
        assert 4 not in store
        store["four"] = states[0]
        assert torch.equal(store["four"], states[0])
        assert store.bytes_of(0) == 8
        assert store.bytes_of(4) == 0
        store.discard(0)
        store.discard("nobody")
        store[5] = states[1]  # takes the place of 0
        assert len(list(store.folder.iterdir())) == 3
        store.clear()
        assert len(store) == len(list(store.folder.iterdir())) == 0
        folder = store.folder
    assert not folder.exists()


def test_an_offloaded_model_fetches_each_layer_once_a_step(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, batches = 5, random_batches(3, 2, 12, lengths=(12, 7))
    options = {"min_depth": 2, "exchanges": 1, "progress": False}
    wanted = searched(tiny_model("llama", layers=layers), AnyDecoder(), PerTokenLoss(), batches, **options)
    model = tiny_model("llama", layers=layers)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    fetched: Counter[nn.Module] = Counter()
    fetch, observe, steps = AlignDevicesHook.pre_forward, Lockstep.observe, []

    def counted(hook: AlignDevicesHook, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fetched[module] += hook.offload
        return fetch(hook, module, *args, **kwargs)

    def step(self: Lockstep, objective: Objective, sets: Sequence[Removed], *args: Any) -> list[Tensor]:
        fetched.clear()
        observed = observe(self, objective, sets, *args)
        steps.append([fetched[layer.mlp.down_proj] for layer in model.model.layers])
        assert fetched[model.model.embed_tokens] == fetched[model.lm_head] == 1
        return observed

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    monkeypatch.setattr(Lockstep, "observe", step)
    assert searched(model, AnyDecoder(), PerTokenLoss(), batches, **options) == wanted
    # after the check: the whole model; layers behind the one that all subnets of a step lack; exchanges
    assert steps[1:] == [[1] * 5, [0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert all(parameter.device == torch.device("meta") for parameter in model.model.layers.parameters())


def test_a_decoder_that_does_something_between_its_layers_is_run_as_a_whole(
    tiny_model: TinyModel, random_batches: RandomBatches, caplog: pytest.LogCaptureFixture
) -> None:
    model, batches, position = tiny_model("llama", layers=5), random_batches(), 0

    def begin(*_: object) -> None:
        nonlocal position
        position = 0

    def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal position
        position += 1
        return (args[0] * (1 + position / 8), *args[1:])

    model.model.register_forward_pre_hook(begin)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(scale)
    with caplog.at_level(logging.WARNING):
        found = searched(model, AnyDecoder(), PerTokenLoss(), batches, min_depth=3, progress=False)
    assert not found.search["lockstep"]
    assert "run from its embeddings" in caplog.text
    assert "computes something else when its layers are called one at a time" in caplog.text
    model.model._forward_pre_hooks.clear()  # deleted() copies hooks, which share position
    for kept, metric in zip(found.kept.values(), found.metric.values(), strict=True):
        subnet = deleted(model, Removed(range(5)) - Removed(kept))
        handle = subnet.model.register_forward_pre_hook(begin)
        assert PerTokenLoss().measure(subnet, batches).value == pytest.approx(metric, rel=1e-6)
        handle.remove()


def test_a_model_with_hooks_of_its_own_is_run_as_a_whole(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    model, batches = tiny_model("llama"), random_batches()
    model.register_forward_pre_hook(lambda module, args: None)
    assert check_contract(model, AnyDecoder(), batches).broken == "the model has forward hooks of its own"
    found = searched(model, AnyDecoder(), PerTokenLoss(), batches, min_depth=3, progress=False)
    assert not found.search["lockstep"]


def test_an_objective_that_looks_at_something_else_than_the_batch_is_told(
    tiny_model: TinyModel, random_batches: RandomBatches
) -> None:
    class FirstRow(PerTokenLoss):
        def observe(self, model: PreTrainedModel, batch: Batch) -> Tensor:
            return super().observe(model, {name: values[:1] for name, values in batch.items()})

    with pytest.raises(DataError, match="let it override measure in place of observe and score"):
        searched(tiny_model("llama"), AnyDecoder(), FirstRow(), random_batches(), min_depth=3, progress=False)


def test_few_recorded_calls_are_kept(
    tiny_model: TinyModel, random_batches: RandomBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_model("llama", layers=6), random_batches()
    wanted = plain(model, SETS, batches)
    monkeypatch.setattr(lockstep, "CALLS_KEPT", 1)
    with evaluating(model), Lockstep.of(model, AnyDecoder(), batches, 5, 2**30) as trial:
        assert scores(trial, SETS) == pytest.approx(wanted, rel=1e-5)
        assert len(trial._calls) == 1


def test_what_a_search_took_is_saved_with_its_strategy(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    found = searched(model, AnyDecoder(), PerTokenLoss(), random_batches(), min_depth=2, progress=False)
    SubnetStrategy(found, WidthStrategy.whole(), "fingerprint").save(tmp_path)
    search = SubnetStrategy.load(tmp_path).depth.search
    assert search == found.search
    assert search["measured"] == 1 + 5
    assert search["peak_bytes"]["states on cpu"] > 3 * 2 * 12 * 64 * 4 * 3  # 3 batches' states before 3 layers
    assert search["peak_bytes"]["process"] > search["peak_bytes"]["states on cpu"]
    assert search["near_ties"] == []


def test_near_ties_are_listed_and_logged(
    tiny_model: TinyModel, random_batches: RandomBatches, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    twin = model.model.layers[1].state_dict()
    for name, value in model.model.layers[2].state_dict().items():
        value.copy_(twin[name])  # it makes no difference which of the two goes
    found = searched(model, AnyDecoder(), PerTokenLoss(), random_batches(), min_depth=3, progress=False)
    assert {"preferred": [2], "other": [1]} in found.search["near_ties"]
    assert "may turn out the other way on other hardware" in caplog.text


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_bfloat16_is_searched_in_lockstep_too(
    tiny_model: TinyModel, random_batches: RandomBatches, model_type: str
) -> None:
    model = tiny_model(model_type, layers=6).to(torch.bfloat16)
    found = searched(model, AnyDecoder(), PerTokenLoss(), random_batches(), min_depth=3, progress=False)
    assert found.search["lockstep"]
    for kept, metric in zip(found.kept.values(), found.metric.values(), strict=True):
        subnet = deleted(model, Removed(range(6)) - Removed(kept))
        assert PerTokenLoss().measure(subnet, random_batches()).value == pytest.approx(metric, rel=1e-2)
