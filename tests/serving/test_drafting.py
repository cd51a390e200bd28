"""A small shape that drafts: what comes out is what the larger shape says alone, whatever the smaller one wrote."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.deployment.profiling.profile import DraftedPair, Drafting, Profile
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.second_tree import second_tree
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.reports.profile_table import notes_on
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.backend import TorchBackend
from amoeba_plugin.serving.drafted_pairs import Trial, drafters_of, hopeful, measure_pair
from amoeba_plugin.serving.drafting import DraftingBackend
from amoeba_plugin.serving.feasible import Decision
from amoeba_plugin.serving.sampling import Sampling
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Latency
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.testing.random_models import attach_random_smol
from support.architectures import CONFIGS
from support.elastic_files import write_elastic
from support.models import make_tiny_model, random_elastic, require_close
from support.sublayers import elastic_of

WHOLE, SMALL, OTHER = (SubnetShape.parse(shape) for shape in ("4x1", "2x1/2", "3x3/4"))
PROMPT = [5, 9, 31, 2, 17, 40]


def alike(live: ElasticModel) -> ElasticModel:
    """Let what layers add be small, so that a smaller shape often says what the larger one does, and not always."""
    with torch.no_grad():
        for name, tensor in (*live.model.named_parameters(), *live.model.named_buffers()):
            if "o_proj" in name or "down_proj" in name:
                tensor.mul_(0.1 if "repaired" in name else 0.2)
    return live


def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amoeba_plugin.serving.drafting.SURE", 0.0)


def rows(model: torch.nn.Module, tokens: Sequence[int], behind: int) -> Tensor:
    """Return the logits behind every token from one on, by the whole sequence at once."""
    with torch.no_grad():
        found: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0, behind - 1 :]
    return found


@pytest.mark.parametrize("case", ["plain", "repaired", "smol", "sublayers", "mixtral"])
@pytest.mark.parametrize("ahead", [1, 3])
def test_every_row_of_logits_is_the_larger_shapes_whatever_tokens_are_drawn(
    case: str, ahead: int, monkeypatch: pytest.MonkeyPatch
):
    sure(monkeypatch)
    model = make_tiny_model(**CONFIGS["mixtral"]) if case == "mixtral" else make_tiny_model("llama")
    live = elastic_of(model) if case == "sublayers" else random_elastic(model, repaired=case == "repaired")
    alike(live)
    if case == "smol":
        attach_random_smol(live)
    target, drafter = map(SubnetShape.parse, ("3.5x1", "2.5x1/2")) if case == "sublayers" else (WHOLE, SMALL)
    with torch.no_grad():
        alone = extract(live, target)
    backend = DraftingBackend(live, {target: drafter}, ahead)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    for number in range(3):
        tokens = [(each + number) % vocabulary for each in PROMPT]
        cache, logits = backend.prefill(target, tokens)
        found = [logits]
        for _ in range(20):  # the likeliest, and now and then another one
            other = bool(torch.rand((), generator=draw) < 0.3)
            tokens.append(int(torch.randint(vocabulary, (), generator=draw)) if other else int(found[-1].argmax()))
            found.append(backend.step(target, cache, tokens[-1]))
        require_close(torch.stack(found), rows(alone, tokens, len(PROMPT)), 2e-4)
    assert 0 < backend.counts.accepted < backend.counts.drafted


def test_requests_of_several_shapes_keep_their_drafts_apart(monkeypatch: pytest.MonkeyPatch):
    sure(monkeypatch)
    live = alike(random_elastic(make_tiny_model("llama")))
    backend = DraftingBackend(live, {WHOLE: SMALL, OTHER: SMALL})
    shapes = itertools.cycle([WHOLE, OTHER, SMALL])
    order: Iterator[SubnetShape] = iter([next(shapes) for _ in range(6)])
    sampling = Sampling(temperature=0.3, seed=3)
    with ElasticService(backend, lambda *_: Latency(1e-3, 1e-3), lambda *_: Decision(next(order))) as service:
        answers = [service.ask(Request([3 + each, *PROMPT], most=12, sampling=sampling)) for each in range(6)]
        pieces = [list(answer) for answer in answers]
    for number, (answer, found) in enumerate(zip(answers, pieces, strict=True)):
        with torch.no_grad():
            alone = extract(live, answer.decision.shape)
        prompt = [3 + number, *PROMPT]
        told = rows(alone, [*prompt, *(piece.token for piece in found)], len(prompt)).log_softmax(-1)
        expected = [float(row[piece.token]) for row, piece in zip(told, found, strict=False)]
        assert [piece.log_probability for piece in found] == pytest.approx(expected, abs=1e-4)
        assert len(found) == 12
    assert backend.counts.accepted > 0


def test_a_model_that_forgets_what_left_its_window_is_refused():
    live = random_elastic(make_tiny_model(**CONFIGS["gemma2"]))
    with pytest.raises(ArchitectureError, match="serve it without drafters"):
        DraftingBackend(live, {WHOLE: SMALL})


def test_a_second_tree_is_a_stock_assistant_of_generate():
    live = alike(random_elastic(make_tiny_model("llama")))
    attach_random_smol(live)
    live.set_shape("3x1")
    small = second_tree(live)
    small.set_shape("2x1/2")
    prompt = torch.tensor([PROMPT])
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = live.model.generate(prompt, **options, eos_token_id=None)
    found = live.model.generate(prompt, assistant_model=small.model, **options, eos_token_id=None)
    gaps = torch.cat(plain.logits).topk(2).values.diff().abs().flatten()
    assert float(gaps.min()) > 1e-3  # so that tokens must be equal
    assert found.sequences.tolist() == plain.sequences.tolist()
    require_close(torch.cat(found.logits), torch.cat(plain.logits), 1e-4)


def test_a_pair_is_measured_on_a_clock_by_both_ways(monkeypatch: pytest.MonkeyPatch):
    """On a clock on which a forward of the whole takes 10, of the small shape 1, only the forwards count."""
    sure(monkeypatch)
    live, now = alike(random_elastic(make_tiny_model("llama"))), [0.0]
    plain = TorchBackend.rows

    def counted(self: TorchBackend, shape: SubnetShape, *given: object) -> tuple[object, Tensor]:
        now[0] += 10.0 if shape == WHOLE else 1.0
        return plain(self, shape, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchBackend, "rows", counted)
    trial = Trial([PROMPT, PROMPT[1:]], answer=11, rounds=2, ahead=3, clock=lambda: now[0])
    same = measure_pair(live, WHOLE, WHOLE, trial)
    assert (same.acceptance, same.alone) == (1.0, 0.1)  # 20 tokens in 200
    assert not same.gains
    found = measure_pair(live, SMALL, WHOLE, trial)
    assert 0 < found.acceptance < 1
    assert found.alone == 0.1
    assert found.gains == (found.drafted > 0.105)


def test_the_best_drafter_of_a_profile_is_taken_where_it_gains_and_the_weights_are_its():
    live = random_elastic(make_tiny_model("llama"))

    def pair(drafter: str, target: str, drafted: float) -> DraftedPair:
        return DraftedPair(drafter=drafter, target=target, acceptance=0.5, alone=10.0, drafted=drafted)

    pairs = [pair("2x1/2", "4x1", 12.0), pair("2x3/4", "4x1", 13.0), pair("2x1/2", "3x1", 10.2)]
    drafting = Drafting(fingerprint=live.strategy.fingerprint, ahead=5, pairs=pairs)
    profile = Profile(model="m", digest="d", sizes={}, machine={}, drafting=drafting)
    assert drafters_of(profile, live) == {WHOLE: SubnetShape.parse("2x3/4")}
    assert list(notes_on(profile)) == ["2x3/4 drafts for 4x1: 13 tokens/s instead of 10, 50% of the drafts accepted"]
    drafting.fingerprint = "of other weights"
    assert drafters_of(profile, live) == {}
    assert drafters_of(profile.model_copy(update={"drafting": None}), live) == {}
    drafting.pairs = pairs[2:]
    assert list(notes_on(profile)) == ["drafting: none of 1 pairs is faster than the larger shape alone"]


def test_pairs_that_are_tried_have_a_drafter_that_is_fast_enough():
    space = ShapeSpace((4, 2), (Fraction(1), Fraction(1, 2)))
    seconds = {"4x1": 1.0, "4x1/2": 0.7, "2x1": 0.6, "2x1/2": 0.3}
    found = [(str(one), str(other)) for one, other in hopeful(space, lambda shape: seconds[str(shape)])]
    assert sorted(found) == [("2x1", "4x1"), ("2x1/2", "2x1"), ("2x1/2", "4x1"), ("2x1/2", "4x1/2")]


def test_the_command_measures_drafting_into_the_profile_and_an_older_profile_is_read(tmp_path: Path):
    live = write_elastic(tmp_path)
    where = ["profile", str(tmp_path / "elastic"), "--flow", "torch:elastic", "-o", str(tmp_path / "p.json")]
    few = ["--rounds", "1", "--shapes", "8", "--prompts", "8", "--decoded", "2"]
    done = CliRunner().invoke(app, [*where, *few])
    assert done.exit_code == 0, done.output
    path = tmp_path / "p.json"
    older = path.read_text()
    path.write_text(older.replace(',\n "drafting": null', ""))
    assert path.read_text() != older
    done = CliRunner().invoke(app, [*where, *few, "--drafting", str(tmp_path / "text.txt")])
    assert done.exit_code == 0, done.output
    drafting = Profile.load(path).drafting
    assert drafting is not None
    assert drafting.fingerprint == live.strategy.fingerprint
    assert all(0 <= pair.acceptance <= 1 for pair in drafting.pairs)
    assert "drafting" in done.output or "drafts for" in done.output


def test_drafting_of_anything_but_an_elastic_model_is_refused_before_it_is_measured(tmp_path: Path):
    write_elastic(tmp_path)
    given = ["profile", str(tmp_path / "base"), "--flow", "torch:elastic", "-o", str(tmp_path / "p.json")]
    done = CliRunner().invoke(app, [*given, "--drafting", str(tmp_path / "text.txt")])
    assert done.exit_code != 0
    assert not (tmp_path / "p.json").exists()
