"""Votes of exits against loops by hand, what their fit improves, and generation against a loop without a cache."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.errors import ArtifactError, DataError, RecipeError
from amoeba_plugin.testing.random_models import random_model
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.voting import RULES, Votes, fit_threshold, fit_votes
from amoeba_plugin.training.layer_tuning.voting_model import VotingModel, logits_of_exits
from support.architectures import CONFIGS
from support.batches import make_random_batches
from support.models import require_close, save_base, tiny_llama

TOKENS = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(4))


def with_exits(model: PreTrainedModel, depths: tuple[int, ...] = (1, 3, 4), stacked: bool = True) -> Exits:
    exits = Exits(model, depths, stacked)
    torch.manual_seed(3)
    with torch.no_grad():
        for depth in exits.depths[:-1]:
            for value in exits.norm(depth).parameters():
                value.add_(torch.rand_like(value))
    return exits


VOTES = Votes(depths=(1, 3, 4), weights=(0.2, 0.3, 0.5), temperatures=(2.0, 0.7, 1.1))


@torch.no_grad()
def voted(exits: Exits, votes: Votes, tokens: Tensor) -> Tensor:
    """Return the vote, exit by exit and token by token, without a cache."""
    parts = []
    for depth, temperature in zip(votes.depths, votes.temperatures, strict=True):
        with exits.active(depth) as stopped:
            parts.append(torch.softmax(stopped(tokens, use_cache=False).logits / temperature, dim=-1))
    if votes.rule == "maximum":
        highest = torch.stack(parts).max(dim=0).values
        return (highest / highest.sum(dim=-1, keepdim=True)).log()
    product = sum(weight * part.log() for weight, part in zip(votes.weights, parts, strict=True))
    return product - product.exp().sum(dim=-1, keepdim=True).log()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_exits_vote_in_every_architecture(kind: str, rule: str):
    exits = with_exits(random_model(CONFIGS[kind]))
    votes = VOTES.model_copy(update={"rule": rule})
    found = VotingModel(exits.model, exits, votes)(input_ids=TOKENS, use_cache=False).logits
    require_close(found, voted(exits, votes, TOKENS), 1e-4)


@pytest.mark.parametrize("depths", [(1, 3, 4), (1, 2, 3)])
@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_generation_with_a_cache_is_that_of_whole_forwards(depths: tuple[int, ...], adapted: bool):
    exits = with_exits(tiny_llama(), depths)
    model = exits.model
    if adapted:
        saved = exits.modules_to_save
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
        model = get_peft_model(exits.model, config).eval()
    votes = VOTES.model_copy(update={"depths": depths})
    voting = VotingModel(model, exits, votes)
    found = voting.generate(
        input_ids=TOKENS,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    tokens = TOKENS
    for step in found.logits:
        expected = voted(exits, votes, tokens)[:, -1]
        require_close(step, expected, 1e-4)
        tokens = torch.cat([tokens, expected.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found.sequences, tokens)
    with torch.no_grad():
        assert not torch.allclose(exits.model(TOKENS).logits[:, -1].log_softmax(-1), found.logits[0])
    assert exits.model.config.num_hidden_layers == 4


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_branches_vote_and_generate_without_a_cache(threshold: float | None):
    exits = with_exits(tiny_llama(), stacked=False)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=exits.modules_to_save, init_lora_weights=False
    )
    model = get_peft_model(exits.model, config).eval()
    voting = VotingModel(model, exits, VOTES.model_copy(update={"threshold": threshold}))
    if threshold is None:
        require_close(voting(input_ids=TOKENS).logits, voted(exits, VOTES, TOKENS), 1e-4)
    tokens = voting.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    step = TOKENS
    for _ in range(4):  # as generate asks: with a threshold, the last position alone has to be sure
        step = torch.cat([step, voting(input_ids=step, logits_to_keep=1).logits.argmax(dim=-1)], dim=1)
    assert torch.equal(tokens, step)
    with pytest.raises(RecipeError, match="use_cache=False, or save_exit"):
        voting.generate(input_ids=TOKENS, use_cache=True)


def test_one_branch_alone_generates_with_a_cache():
    exits = with_exits(tiny_llama(), stacked=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=exits.modules_to_save, init_lora_weights=False)
    model = get_peft_model(exits.model, config).eval()
    voting = VotingModel(model, exits, Votes.alike((4,)))
    how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = voting.generate(input_ids=TOKENS, eos_token_id=None, **how)
    assert found.past_key_values.get_seq_length() == TOKENS.shape[1] + 4
    expected = voting.generate(input_ids=TOKENS, eos_token_id=None, use_cache=False, **how)
    require_close(torch.cat(found.logits), torch.cat(expected.logits), 1e-4)
    require_close(found.logits[0], voted(exits, Votes.alike((4,)), TOKENS)[:, -1], 1e-4)


def test_beams_and_padded_batches_generate():
    exits = with_exits(tiny_llama())
    voting = VotingModel(exits.model, exits, VOTES)
    how = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    beams = voting.generate(input_ids=TOKENS, num_beams=3, **how)
    assert torch.equal(beams, voting.generate(input_ids=TOKENS, num_beams=3, use_cache=False, **how))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), TOKENS], dim=1)
    mask = (padded != 0).long()
    mask[:, 3:] = 1
    together = voting.generate(input_ids=padded, attention_mask=mask, **how)
    assert torch.equal(together[:, 3:], voting.generate(input_ids=TOKENS, **how))


@settings(deadline=None, max_examples=20)
@given(exits=st.integers(1, 4), seed=st.integers(0, 99))
def test_fitted_votes_lose_no_more_than_any_exit_alone(exits: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(9, (80,), generator=generator)
    logits = torch.randn(exits, 80, 9, generator=generator)
    for number, each in enumerate(logits):
        each[torch.arange(80), labels] += number  # deeper ones know more
    votes = fit_votes(range(1, exits + 1), logits * 3, labels)
    assert math.isclose(sum(votes.weights), 1, abs_tol=1e-5)

    def loss(log_probabilities: Tensor) -> float:
        return -log_probabilities[torch.arange(80), labels].mean().item()

    best = min(loss(votes.alone(number, each)) for number, each in enumerate(logits * 3))
    assert loss(votes.combined(logits * 3)) <= best + 1e-3
    for number, each in enumerate(logits * 3):  # no temperature of a grid is better
        grid = [loss(torch.log_softmax(each / t, dim=-1)) for t in torch.linspace(0.3, 8, 60)]
        assert loss(votes.alone(number, each)) <= min(grid) + 1e-3


def test_the_fit_of_two_exits_is_the_best_of_a_grid():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (200,), generator=generator)
    logits = torch.randn(2, 200, 7, generator=generator)
    logits[0, torch.arange(200), labels] += 1
    logits[1, torch.arange(200), labels] += 1.5
    votes = fit_votes((2, 4), logits, labels)

    def loss(weight: float) -> float:
        tried = votes.model_copy(update={"weights": (weight, 1 - weight)})
        return -tried.combined(logits)[torch.arange(200), labels].mean().item()

    best = min(torch.linspace(0, 1, 201).tolist(), key=loss)
    assert votes.weights[0] == pytest.approx(best, abs=0.02)
    assert 0.1 < best < 0.9


def test_a_threshold_keeps_the_agreement_asked_for():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 400, 7, generator=generator)
    votes = Votes.alike((1, 2, 3))
    voted_for = votes.combined(logits).argmax(dim=-1)
    thresholds = []
    for agreement in (0.6, 0.8, 0.95, 1.0):
        threshold = fit_threshold(votes, logits, agreement).threshold
        right = []
        for position in range(400):
            token = voted_for[position]
            for number in (0, 1):
                probabilities = torch.softmax(logits[number, position], dim=-1)
                if probabilities.max() > threshold:
                    token = probabilities.argmax()
                    break
            right.append(bool(token == voted_for[position]))
        assert sum(right) / 400 >= agreement
        thresholds.append(threshold)
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < thresholds[-1]


@pytest.mark.parametrize(("threshold", "depth"), [(0.0, 1), (1.0, 4)])
def test_an_exit_that_is_sure_answers_alone(threshold: float, depth: int):
    exits = with_exits(tiny_llama())
    voting = VotingModel(exits.model, exits, VOTES.model_copy(update={"threshold": threshold}))
    ran: list[int] = []
    for number, layer in enumerate(exits.layers):
        layer.self_attn.register_forward_hook(lambda *_, n=number: ran.append(n))
    found = voting(input_ids=TOKENS, use_cache=False).logits
    assert voting.answered == depth
    assert ran == list(range(depth))  # and no layer twice
    if depth == 4:
        require_close(found, voted(exits, VOTES, TOKENS), 1e-4)
    else:
        with exits.active(1) as stopped, torch.no_grad():
            require_close(found, (stopped(TOKENS).logits / 2).log_softmax(dim=-1), 1e-5)
    tokens = voting.generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 9)
    with pytest.raises(RecipeError, match="use_cache=False, or save_exit"):
        voting.generate(input_ids=TOKENS, use_cache=True)


def test_votes_are_saved_with_the_model(tmp_path: Path):
    base = save_base(tiny_llama(vocab_size=97), tmp_path / "base")
    exits = with_exits(AutoModelForCausalLM.from_pretrained(base))
    batches = make_random_batches(3)
    voting = VotingModel.fitted(exits.model, exits, batches, agreement=0.9)
    voting.save_pretrained(tmp_path / "voting")
    again = VotingModel.from_pretrained(tmp_path / "voting")
    assert again.votes == voting.votes
    require_close(again(input_ids=TOKENS).logits, voting(input_ids=TOKENS).logits)
    (tmp_path / "voting" / "votes.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a vote of exits, damaged"):
        VotingModel.from_pretrained(tmp_path / "voting")


def test_logits_of_exits_are_those_of_the_positions_before_labels():
    exits = with_exits(tiny_llama(vocab_size=97))
    batches = make_random_batches(3, lengths=(12, 7))
    logits, labels = logits_of_exits(exits.model, exits, batches, 40)
    expected, tokens = [], []
    for batch in batches:
        with exits.active(3) as stopped, torch.no_grad():
            found = stopped(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        for row, length in enumerate((12, 7)):
            expected += [found[row, position] for position in range(length - 1)]
            tokens += batch["input_ids"][row, 1:length].tolist()
    assert labels.tolist() == tokens[:40]
    require_close(logits[1], torch.stack(expected)[:40])
    nothing = copy.deepcopy(batches[:1])
    nothing[0]["labels"].fill_(-100)
    with pytest.raises(DataError, match="no position of the held-out text has a label"):
        logits_of_exits(exits.model, exits, nothing, 40)


def test_impossible_votes_are_refused():
    exits = with_exits(tiny_llama(), (2, 4))
    with pytest.raises(ArtifactError, match=r"votes are of exits at 1, 3, 4, and the model has 2, 4"):
        VotingModel(exits.model, exits, VOTES)
    with pytest.raises(RecipeError, match="choose one of weighted, maximum"):
        Votes.alike((1, 2), "mean")
    with pytest.raises(ValidationError, match="a weight and a temperature to every exit"):
        Votes(depths=(1, 2), weights=(1.0,), temperatures=(1.0, 1.0))
