"""How much of a trained adapter every shape takes: what the router does with it, how it is found, and what keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import amoeba_plugin
from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.checkpoint import load_elastic, save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ConfigError
from amoeba_plugin.modifiers import OneForAllDistillationModifier, one_for_all
from amoeba_plugin.selection.objectives import PerTokenLoss
from amoeba_plugin.smol import SmolConfig, SmolLinear
from amoeba_plugin.smol.config import COMBINATIONS
from amoeba_plugin.training.one_for_all.strengths import TRIED, fit_strengths, lowest_of_parabola
from support.models import logits, logits_at, random_elastic, require_close, save_base, tiny_llama
from support.recipes import run_on_rows, training_recipe
from support.training import add_smol

SHAPES = {"4x3/4": 0.3, "3x1": 0.0, "2x1/2": 1.7}


def adapted(**fields: Any) -> tuple[ElasticModel, Any]:
    elastic = random_elastic(tiny_llama())
    return elastic, add_smol(elastic, **({"router_noise": False} | fields)).eval()


def text(seed: int) -> list[Batch]:
    ids = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row[None], "labels": row[None], "attention_mask": torch.ones(1, 9).long()} for row in ids]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_an_update_is_multiplied_by_its_shapes_strength(combination: str) -> None:
    (plain, _), (weighed, model) = (adapted(combination=combination, strengths=each) for each in ({}, SHAPES))
    layers = [module for module in plain.model.modules() if isinstance(module, SmolLinear)]
    for shape in plain.space:
        factor = SHAPES.get(str(shape), 1.0)
        for layer in layers:
            layer.smol_scaling["default"] = factor * layer.initial_scaling["default"]
        require_close(logits_at(weighed, shape), logits_at(plain, shape), 2e-5)
    with weighed.active("3x1"), model.disable_adapter():
        base = logits(weighed.model)
    assert torch.equal(logits_at(weighed, "3x1"), base)


def losses_of(elastic: ElasticModel, config: SmolConfig, shape: str, strength: float) -> float:
    before, config.strengths = config.strengths, {shape: strength}
    with elastic.active(shape) as model:
        found = PerTokenLoss().measure(model, text(1)).value
    config.strengths = before
    return found


@pytest.mark.parametrize("adapt_largest", [True, False])
def test_every_shape_gets_the_strength_that_loses_least(adapt_largest: bool) -> None:
    elastic, model = adapted(adapt_largest=adapt_largest, lora_alpha=0.5)
    elastic.set_shape("3x1")
    found = fit_strengths(elastic, model, text(1))
    config = model.active_peft_config
    assert found == config.strengths
    assert len(set(found.values())) > 1
    assert str(elastic.shape) == "3x1"
    assert adapt_largest or str(elastic.space.largest) not in found
    for shape in map(str, elastic.space):
        none, half, whole = (losses_of(elastic, config, shape, strength) for strength in TRIED)
        tried = {0.0: none, 0.5: half, 1.0: whole}
        vertex = lowest_of_parabola(none, half, whole)
        tried[vertex] = losses_of(elastic, config, shape, vertex)
        expected = min(tried.values())
        assert losses_of(elastic, config, shape, found.get(shape, 1.0)) == expected
        with elastic.active(shape) as active:  # what is active from now on is what was found
            assert PerTokenLoss().measure(active, text(1)).value == expected


def test_an_adapter_that_says_nothing_stays_whole() -> None:
    elastic, model = adapted()
    for module in model.modules():
        if isinstance(module, SmolLinear):
            module.bank("default").reset(True)
    assert fit_strengths(elastic, model, text(1)) == {}


@given(lowest=st.floats(-0.5, 1.5), curvature=st.floats(0.1, 10), least=st.floats(-5, 5))
def test_a_parabola_is_lowest_where_a_grid_finds_it(lowest: float, curvature: float, least: float) -> None:
    at = [least + curvature * (strength - lowest) ** 2 for strength in TRIED]
    grid = min((k / 1000 for k in range(1001)), key=lambda strength: (strength - lowest) ** 2)
    assert lowest_of_parabola(*at) == pytest.approx(grid, abs=0.0061)


@given(st.tuples(*[st.floats()] * 3))
def test_whatever_was_measured_a_strength_is_a_share(losses: tuple[float, float, float]) -> None:
    assert 0 <= lowest_of_parabola(*losses) <= 1


def test_checkpoints_and_subnets_keep_strengths(tmp_path: Path) -> None:
    base = save_base(tiny_llama(vocab_size=97), tmp_path / "base")
    elastic = random_elastic(AutoModelForCausalLM.from_pretrained(base).eval())
    model = add_smol(elastic, router_noise=False, strengths=SHAPES).eval()
    save_elastic(elastic, model, tmp_path / "elastic", str(base))
    reloaded, _ = load_elastic(tmp_path / "elastic")
    for shape in SHAPES:
        expected = logits_at(elastic, shape)
        require_close(logits_at(reloaded, shape), expected, 1e-6)
        require_close(logits(amoeba_plugin.extract(elastic, shape)), expected, 5e-5)


@pytest.mark.usefixtures("fresh_session")
def test_a_recipe_holds_rows_back_and_writes_what_they_say(base: Path, tmp_path: Path) -> None:
    fields = {"learning_rate": 0.3, "strength_rows": 1}
    with mock.patch.object(one_for_all, "fit_strengths", side_effect=fit_strengths) as fitted:
        run_on_rows(base, training_recipe(tmp_path / "elastic", **fields))
    rows = fitted.call_args.args[-1]
    assert len(rows) == 1
    elastic, model = load_elastic(tmp_path / "elastic")
    assert model is not None
    found = dict(model.active_peft_config.strengths)
    assert found  # so high a rate hurts
    model.active_peft_config.strengths = {}
    assert fit_strengths(elastic, model, rows) == pytest.approx(found, abs=0.02)


def test_rows_that_decide_are_not_trained_on() -> None:
    rows = [{"input_ids": torch.tensor([number])} for number in range(100)]
    for asked, given_back in ((16, 12), (5, 5), (0, 0)):
        kept, apart = OneForAllDistillationModifier(strength_rows=asked)._parted(rows)
        assert [int(row["input_ids"]) for row in kept] == list(range(100 - given_back))
        assert [int(batch["input_ids"]) for batch in apart] == list(range(100 - given_back, 100))
    assert OneForAllDistillationModifier()._parted(rows[:31]) == (rows[:31], [])  # too few to tell
    lora = OneForAllDistillationModifier(adapter={"type": "lora", "r": 2})
    assert lora._parted(rows) == (rows, [])


@pytest.mark.parametrize(
    ("strengths", "words"),
    [({"4x": 1.0}, "strengths names the shape '4x'"), ({"4x2/4": 1.0}, "write 4x1/2"), ({"4x1": -1.0}, "0 or more"),
     ({"4x1": float("nan")}, "0 or more"), ({"4x1": "much"}, "0 or more")],
)  # fmt: skip
def test_strengths_that_are_none_are_refused(strengths: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SmolConfig(strengths=strengths)
