"""What the demo stands on: an honest split, a model that was trained, a task that can be failed."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from amoeba_plugin.demo import budgets
from amoeba_plugin.demo import run as demo
from amoeba_plugin.demo.corpus import is_held_out, part_files, token_blocks
from amoeba_plugin.demo.data import BLOCK_SIZE, MODEL, QUICK, batches_of
from amoeba_plugin.demo.multiple_choice import CHOICES, CONTEXT_TOKENS, multiple_choice
from amoeba_plugin.demo.pretrain import xz_bits_per_byte
from amoeba_plugin.demo.run import run_demo
from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.cost_model import cost_models
from amoeba_plugin.deployment.profiling.profile import FlowProfile, Profile, Round, Seconds, ShapeCost
from amoeba_plugin.reports.report import Report
from amoeba_plugin.selection.registry import objective_named
from amoeba_plugin.shape import ShapeSpace


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return found


def test_no_module_is_in_both_parts() -> None:
    train, held_out = ({file.module for file in part_files(part)} for part in ("train", "held_out"))
    assert not train & held_out
    assert len(train) > 5 * len(held_out) > 0


def test_the_split_is_the_one_the_model_was_trained_with() -> None:
    """Modules by name, so the answer is the same for every Python version."""
    assert is_held_out("email")
    assert is_held_out("dataclasses")
    assert not is_held_out("asyncio")
    assert not is_held_out("json")


def test_blocks_give_the_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    file = part_files("held_out")[0]
    blocks = token_blocks([file], tokenizer, 32)
    ids = [token for row in blocks["input_ids"] for token in row[1:]]
    assert file.text.startswith(tokenizer.decode(ids))
    assert all(row[0] == tokenizer.bos_token_id for row in blocks["input_ids"])
    assert all(
        row[0] == -100 and row[1:] == ids[1:] for row, ids in zip(blocks["labels"], blocks["input_ids"], strict=True)
    )


def test_the_shipped_model_is_small_and_of_the_stated_architecture(model: PreTrainedModel) -> None:
    config = model.config
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 12 * 2**20
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 12
    assert 128 <= config.hidden_size <= 256
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.intermediate_size % 128 == 0
    assert config.max_position_embeddings >= 256


def test_the_shipped_model_was_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fewer bits per byte than `xz -9e` on the same held-out files: as recorded, and again on some of them."""
    recorded = json.loads((MODEL / "held_out.json").read_text())
    assert recorded["bits_per_byte"] < recorded["xz_bits_per_byte"]
    files = [file for file in part_files("held_out") if file.module in {"dataclasses", "tomllib", "netrc"}]
    blocks = batches_of(token_blocks(files, tokenizer, BLOCK_SIZE, limit=24))
    nats = objective_named("loss").measure(model, blocks).value
    text = "".join(file.text for file in files)
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert nats / 0.6931 * tokens / len(text.encode()) < xz_bits_per_byte(files)


def test_questions_have_one_answer_and_choices_of_one_context(tokenizer: PreTrainedTokenizerBase) -> None:
    batches = multiple_choice(part_files("held_out"), tokenizer, questions=6, seed=1, batch_size=8)
    ids, question, answer = (
        torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "question", "is_answer")
    )
    assert len(ids) == 6 * CHOICES
    for each in range(6):
        rows = ids[question == each]
        assert answer[question == each].sum() == 1
        assert (rows[:, : 1 + CONTEXT_TOKENS] == rows[0, : 1 + CONTEXT_TOKENS]).all()
        assert len({tuple(row.tolist()) for row in rows}) == CHOICES


def test_the_dense_model_answers_far_more_than_chance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    questions = multiple_choice(part_files("held_out"), tokenizer, questions=40, seed=3)
    assert objective_named("accuracy").measure(model, questions).value >= 0.45


@given(st.lists(st.floats(1.0, 1.6), min_size=3, max_size=3))
def test_a_shape_keeps_the_budget_however_the_machine_was_disturbed(noise: list[float]) -> None:
    space = ShapeSpace((2, 1), (Fraction(1), Fraction(1, 2)))
    sizes = {str(shape): (2 * shape.depth, 8, 64 * shape.depth) for shape in space}
    slowed = dict(zip(["2x1", "1x1", "1x1/2"], noise, strict=True))
    shapes = {
        shape: ShapeCost(work=sizes[shape], bytes=1, rounds=[_visit(slower * sizes[shape][0])])
        for shape, slower in slowed.items()
    }
    flow = FlowProfile(engine={}, threads=1, batch=1, decoded=4, shapes=shapes)
    profile = Profile(model="m", digest="", sizes=sizes, machine={}, flows={"torch:fp32": flow})
    budget = budgets._budget(profile, "torch:fp32", space)
    model = cost_models(flow)["prefill"]
    costs = {str(shape): model.predict(profile.works[str(shape)], 8).value for shape in space}
    (limit,) = budget.limits
    assert min(costs.values()) <= limit.most
    assert limit.most >= 0.69 * costs["2x1"]


def _visit(seconds: float) -> Round:
    took = Seconds(wall=seconds, cpu=seconds)
    return Round(load=took, prefill={8: took}, decode=took, peak=1)


def test_a_shortened_demo_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(
        QUICK, held_out_blocks=4, questions=4, training_steps=1, training_blocks=16, shapes=("12x1", "10x3/4", "8x1/2")
    )
    monkeypatch.setattr(demo, "QUICK", short)
    run_demo(tmp_path / "out", quick=True, seed=1)
    report = Report.model_validate_json((tmp_path / "out/report.json").read_bytes())
    assert [row.shape for row in report.shapes] == ["12x1", "10x3/4", "8x1/2"]
    assert report.shapes[0].block_share == 1
    assert report.shapes[2].block_share == pytest.approx(8 / 12 * 1 / 2, abs=0.01)
    assert report.shapes[2].parameters < report.dense.parameters
    assert report.profile is not None
    row = report.budgets[0]
    (limit,) = Budget.parse(row.frontier.budget).limits
    assert row.deployed.shape == row.frontier.chosen
    assert row.frontier.best.costs[limit.name].value <= limit.most
    AutoModelForCausalLM.from_pretrained(row.deployed.directory)
    free, middle, tight = report.requests
    assert (free.slo, free.shape) == ("none", "12x1")
    assert tight.promised_ttft_ms < middle.promised_ttft_ms < free.promised_ttft_ms
    for request in (middle, tight):
        assert request.promised_ttft_ms <= float(request.slo.split()[1])
    assert report.quantized is not None
    assert report.quantized.checkpoint_bytes < report.quantized.unquantized_bytes / 3
    assert {"depth search", "width ranking", "one-for-all training"} <= report.provenance.stage_seconds.keys()
    assert (tmp_path / "out/report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "out/quantized/config.json").read_text())["num_hidden_layers"] == 10
