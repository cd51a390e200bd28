"""Objectives against a loop over rows and tokens that shares no code with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.errors import DataError
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.selection import objectives
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, Perplexity, PerTokenLoss, Score, better
from support.batches import make_questions

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]
FAMILY = ["llama", "mistral", "qwen2", "qwen3"]


@torch.no_grad()
def row_nats(model: PreTrainedModel, batch: Batch, row: int) -> list[float]:
    """Read the definition: one unpadded row at a time, one target at a time."""
    length = int(batch["attention_mask"][row].sum())
    ids, labels = batch["input_ids"][row, :length], batch["labels"][row, :length]
    logits = model(ids[None]).logits[0].double()
    return [-logits[t].log_softmax(-1)[labels[t + 1]].item() for t in range(length - 1) if labels[t + 1] != -100]


@pytest.mark.parametrize("model_type", FAMILY)
def test_loss_is_the_mean_over_all_tokens_of_all_batches(
    tiny_model: TinyModel, random_batches: RandomBatches, model_type: str
) -> None:
    model = tiny_model(model_type)
    batches = [*random_batches(2, 3, 12, lengths=(12, 5, 9)), *random_batches(1, 2, 4, seed=1)]
    nats = [value for batch in batches for row in range(len(batch["labels"])) for value in row_nats(model, batch, row)]
    score = PerTokenLoss().measure(model, batches)
    assert score.value == score.loss == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    perplexity = Perplexity().measure(model, batches)
    assert perplexity.value == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert perplexity.loss == score.loss


def test_loss_does_not_depend_on_how_many_logits_are_made_at_once(
    tiny_model: TinyModel, random_batches: RandomBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_model("llama"), random_batches(2, lengths=(12, 7))
    whole = PerTokenLoss().measure(model, batches).value
    for positions in (1, 5):
        monkeypatch.setattr(objectives, "LOGITS_AT_ONCE", 97 * positions)
        assert PerTokenLoss().measure(model, batches).value == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_the_class_itself_caps_and_scales_its_logits_a_few_at_a_time(
    tiny_model: TinyModel,
    random_batches: RandomBatches,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    overrides: dict[str, object],
) -> None:
    model, batches = tiny_model(model_type, **overrides), random_batches(1, 3, lengths=(12, 5, 9))
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape[-2]))
    monkeypatch.setattr(objectives, "LOGITS_AT_ONCE", 97 * 7)
    found = PerTokenLoss().measure(model, batches).value
    assert max(shapes) == 7
    assert sum(shapes) == sum(length - 1 for length in (12, 5, 9))
    nats = [value for row in range(3) for value in row_nats(model, batches[0], row)]
    assert found == pytest.approx(sum(nats) / len(nats), rel=1e-6)


def test_a_model_with_hooks_of_its_own_is_asked_as_a_whole(
    tiny_model: TinyModel, random_batches: RandomBatches
) -> None:
    model, batches = tiny_model("llama"), random_batches(1)
    before = PerTokenLoss().measure(model, batches).value
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    assert PerTokenLoss().measure(model, batches).value == pytest.approx(before, rel=1e-6)
    assert calls


@pytest.mark.parametrize(("rows", "choices"), [(4, 4), (3, 4), (2, 3)])
def test_accuracy_picks_the_choice_of_least_loss_per_token(
    tiny_model: TinyModel, random_batches: RandomBatches, rows: int, choices: int
) -> None:
    model = tiny_model("llama")
    batches = make_questions(random_batches(12, rows, seed=3), choices)  # rows 3, choices 4: questions straddle batches
    means: dict[int, list[tuple[float, int]]] = {}
    answer_nats: list[float] = []
    for batch in batches:
        for row in range(rows):
            nats, is_answer = row_nats(model, batch, row), int(batch["is_answer"][row])
            means.setdefault(int(batch["question"][row]), []).append((sum(nats) / len(nats), is_answer))
            answer_nats += nats if is_answer else []
    right = sum(min(choices_of)[1] for choices_of in means.values())
    assert 0 < right < len(means)
    score = MultipleChoiceAccuracy().measure(model, batches)
    assert score.value == right / len(means)
    assert score.loss == pytest.approx(sum(answer_nats) / len(answer_nats), rel=1e-6)


def test_accuracy_normalises_by_length() -> None:
    # (nats, tokens, question, is_answer): the answer has more nats in all, and less per token
    rows = torch.tensor([[3.0, 3, 0, 1], [2.0, 1, 0, 0]], dtype=torch.float64)
    assert MultipleChoiceAccuracy().score(rows) == Score(1.0, 1.0)


@pytest.mark.parametrize(
    "nats", [[2.0, 2.0], [float("nan"), 1.0], [1.0, float("nan")]], ids=["tie", "nan", "other nan"]
)
@pytest.mark.parametrize("answer_first", [True, False])
def test_a_tie_or_nan_is_no_right_answer(nats: list[float], answer_first: bool) -> None:
    rows = torch.tensor([[nats[0], 1, 4, answer_first], [nats[1], 1, 4, not answer_first]], dtype=torch.float64)
    assert MultipleChoiceAccuracy().score(rows).value == 0


def test_perplexity_that_overflows_is_infinite() -> None:
    assert Perplexity().score(torch.tensor([[1000.0, 1]], dtype=torch.float64)) == Score(math.inf, 1000.0)


def test_better_knows_direction_ties_and_nan() -> None:
    loss, accuracy, nan = PerTokenLoss(), MultipleChoiceAccuracy(), math.nan
    assert better(loss, Score(1.0, 1.0), Score(2.0, 2.0))
    assert not better(loss, Score(2.0, 2.0), Score(1.0, 1.0))
    assert better(accuracy, Score(0.5, 9.0), Score(0.4, 1.0))
    assert better(accuracy, Score(0.5, 1.0), Score(0.5, 2.0))
    assert not better(accuracy, Score(0.5, 1.0), Score(0.5, 1.0))
    for objective in (loss, accuracy):
        for worst in (Score(nan, nan), Score(math.inf, 3.0), Score(-math.inf, nan)):
            assert better(objective, Score(0.1, 5.0), worst)
            assert not better(objective, worst, Score(0.1, 5.0))
            assert not better(objective, worst, worst)


def test_every_module_gets_its_own_mode_back(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    PerTokenLoss().measure(model, random_batches(1))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_loss_refuses_batches_without_targets(random_batches: RandomBatches) -> None:
    batches = random_batches(2)
    with pytest.raises(
        DataError, match="objective loss needs the column labels; the data has input_ids, attention_mask"
    ):
        PerTokenLoss().check([{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches])
    for batch in batches:
        batch["labels"][:, 1:] = -100  # label 0 is predicted from nothing
    with pytest.raises(DataError, match="no position of the 2 batches has a label to predict"):
        PerTokenLoss().check(batches)


def test_accuracy_refuses_what_is_no_question(random_batches: RandomBatches) -> None:
    accuracy = MultipleChoiceAccuracy()
    with pytest.raises(
        DataError, match=r"batch 0 lacks question, is_answer \(it has input_ids, attention_mask, labels\)"
    ):
        accuracy.check(random_batches(1))
    batches = make_questions(random_batches(2, 4), 4)
    accuracy.check(batches)
    with pytest.raises(DataError, match="question 11 has 1 choices of which 0 are answers"):
        accuracy.check(make_questions(random_batches(1, 5), 4))
    batches[1]["labels"][2] = -100
    with pytest.raises(DataError, match="a choice in batch 1 has no label to predict"):
        accuracy.check(batches)
