"""What the modifiers of a recipe know of one another, from one run on a model to the next."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from llmcompressor.core import active_session, reset_session
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.errors import AmoebaError, ArchitectureError, ShapeError
from amoeba_plugin.modifiers import DepthShrinkingModifier, WidthShrinkingModifier
from amoeba_plugin.modifiers.width import JUDGING_SPLITS
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.selection.repair.fold_table import parted
from amoeba_plugin.shape import SubnetShape
from support.batches import make_random_batches, token_dataset
from support.models import logits, save_base
from support.recipes import DEPTH, WIDTH, recipe, run

TinyModel = Callable[..., PreTrainedModel]


def shrunk(model: PreTrainedModel, shape: str, seed: int) -> PreTrainedModel:
    text = recipe(DEPTH | WIDTH, {"SubnetExtractionModifier": {"shape": shape}})
    reset_session()
    return run(model, text, token_dataset(seed))


@pytest.mark.usefixtures("fresh_session")
def test_a_run_after_one_that_failed_begins_anew(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = save_base(tiny_model("llama", layers=6), tmp_path / "base")
    model, other = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    with pytest.raises(ShapeError, match="3x7/8 is outside the space"):
        shrunk(model, "3x7/8", seed=1)
    again, fresh = shrunk(model, "3x1/2", seed=2), shrunk(other, "3x1/2", seed=2)
    torch.testing.assert_close(logits(again), logits(fresh), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("fresh_session")
def test_a_decoder_whose_layers_cannot_run_alone_is_not_repaired(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def asked(model: PreTrainedModel, **fields: str) -> PreTrainedModel:
        model.register_forward_hook(lambda *_: None)
        depth = {"DepthShrinkingModifier": {"min_depth": 2, "selector": "last_layers", **fields}}
        reset_session()
        return run(model, recipe(depth, {"SubnetExtractionModifier": {"shape": "3x1"}}), token_dataset(1))

    base = save_base(tiny_model("llama"), tmp_path / "base")
    with caplog.at_level("WARNING"):
        subnet = asked(AutoModelForCausalLM.from_pretrained(base))
    assert "nothing is repaired: layers of a LlamaForCausalLM cannot be run one at a time" in caplog.text
    assert len(subnet.model.layers) == 3
    with pytest.raises(ArchitectureError, match="repair is impossible: layers of .*; set repair: none"):
        asked(AutoModelForCausalLM.from_pretrained(base), repair="least_squares")


@pytest.mark.usefixtures("fresh_session")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("fields", "repaired", "cut"),
    [
        ({}, "obs", "flap"),
        ({"repair": "none"}, "flap", "flap"),
        ({"bias_compensation": True}, "flap", "flap"),
        ({"allocation": "uniform"}, "obs", "flap"),
        ({"importance": "magnitude"}, "magnitude", "magnitude"),
    ],
)
def test_units_are_ranked_by_what_repair_leaves_where_there_is_one(
    tiny_model: TinyModel, tmp_path: Path, fields: dict[str, object], repaired: str, cut: str, alone: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_base(tiny_model("llama"), tmp_path / "base"))
    if not alone:
        model.register_forward_hook(lambda *_: None)  # its layers cannot be run one at a time, nor repaired
    width = {"WidthShrinkingModifier": {"widths": ["1", "1/2"], **fields}}
    run(model, recipe(width, {"SubnetExtractionModifier": {"shape": "4x1/2"}}), token_dataset(1))
    (written,) = [each for each in active_session().lifecycle.recipe.modifiers if hasattr(each, "importance")]
    assert written.importance == (repaired if alone else cut)


@pytest.mark.usefixtures("fresh_session")
def test_an_importance_that_was_asked_for_is_not_exchanged(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_base(tiny_model("llama"), tmp_path / "base"))
    model.register_forward_hook(lambda *_: None)
    width = {"WidthShrinkingModifier": {"widths": ["1", "1/2"], "importance": "obs"}}
    with pytest.raises(ArchitectureError, match="importance: obs is impossible: .*; take flap"):
        run(model, recipe(width, {"SubnetExtractionModifier": {"shape": "4x1/2"}}), token_dataset(1))


@pytest.mark.usefixtures("fresh_session")
def test_a_total_is_cut_at_the_shape_that_was_chosen_for_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_base(tiny_model("llama", layers=6), tmp_path / "base"))
    before = sum(each.numel() for layer in model.model.layers for each in layer.parameters())
    depth = {"DepthShrinkingModifier": {"min_depth": "1/2", "selector": "block_influence"}}
    width = {"WidthShrinkingModifier": {"totals": ["3/4", "1/2"], "round_to": {"mlp": 8}}}
    text = recipe(depth | width, {"SubnetExtractionModifier": {"total": "0.5"}})
    subnet = run(model, text, token_dataset(1))
    after = sum(each.numel() for layer in subnet.model.layers for each in layer.parameters())
    assert 0.45 < after / before < 0.55
    assert 3 <= len(subnet.model.layers) <= 6
    written = {type(each).__name__: each for each in active_session().lifecycle.recipe.modifiers}
    shape = SubnetShape.parse(written["SubnetExtractionModifier"].shape)
    assert shape.depth == len(subnet.model.layers)
    assert shape.width * Fraction(shape.depth) == 3
    assert str(shape.width) in written["WidthShrinkingModifier"].widths
    assert written["SubnetExtractionModifier"].total is None


@pytest.mark.parametrize(
    ("width", "extract", "told"),
    [
        ({"totals": ["1/2"]}, {"total": "3/4"}, 'total 3/4 is none .*; add "3/4" to its totals, or take one of 1/2'),
        ({"widths": ["1", "1/2"]}, {"total": "1/2"}, 'total 1/2 is none .*; add "1/2" to its totals$'),
        ({"totals": ["1/2"]}, {}, "cuts one subnet; give shape: DEPTHxWIDTH, or total: a share"),
        ({"totals": ["1/2"]}, {"total": "1/2", "shape": "3x1"}, "cuts one subnet; give shape"),
        (
            {"totals": ["1/2"], "allocation": "global"},
            {"total": "1/2"},
            "totals are measured over all layers, with allocation: global",
        ),
        ({"totals": "1/2"}, {"total": "1/2"}, "totals: '1/2' is no list of shares"),
        ({}, {"shape": "3x1"}, "WidthShrinkingModifier has no widths"),
    ],
)
def test_a_total_that_makes_no_sense_is_refused_before_anything_runs(
    width: dict[str, object], extract: dict[str, str], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe({"WidthShrinkingModifier": width}, {"SubnetExtractionModifier": extract}))
    with pytest.raises(AmoebaError, match=told):
        plan_recipe(path)


@pytest.mark.parametrize("least", ["0/3", "2/0", 0, -1, 1.5, True, "many", "4/3"])
def test_a_least_depth_is_a_number_of_layers_or_a_share(least: object) -> None:
    with pytest.raises(ValueError, match="min_depth|width"):
        DepthShrinkingModifier(min_depth=least)


@pytest.mark.parametrize(("rows", "judging"), [(8, 4), (100, 50), (512, 64), (1024, 128)])
def test_as_many_rows_judge_splits_as_are_told(rows: int, judging: int) -> None:
    batches = make_random_batches(rows // 4, rows=4, positions=6, seed=3)
    assert WidthShrinkingModifier(widths=["1", "1/2"]).judging(rows) == judging
    _, judged = parted(batches, JUDGING_SPLITS)
    assert sum(len(batch["input_ids"]) for batch in judged) == judging
