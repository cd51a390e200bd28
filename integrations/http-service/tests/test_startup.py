"""The command, before it listens: what it refuses, and the profile that it makes where there is none."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import socket
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from amoeba_http_service import resident
from amoeba_http_service.command import serve
from amoeba_http_service.resident import FLOW, How, profile_for_service
from amoeba_http_service.settings import Door, Limits

from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.deployment.profiling.profile import DraftedPair, Drafting, Profile
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.plugins.commands import offered_commands
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.compact.features import Features
from amoeba_plugin.serving.compact.files import Tuned, save_compact
from amoeba_plugin.serving.compact.heads import Choices, DecisionHead, ScoreHead
from amoeba_plugin.serving.compact.reader import CompactModel
from amoeba_plugin.serving.drafting import DraftingBackend
from amoeba_plugin.serving.feasible import profiled
from amoeba_plugin.shape import SubnetShape

PAGE = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize(
    ("options", "token", "words"),
    [
        (["--host", "0.0.0.0"], "", "0.0.0.0 is reached by other machines"),
        (["--host", "192.0.2.1"], "", "set AMOEBA_SERVE_TOKEN to a secret"),
        (["--host", "::"], "short", "reached by other machines"),
        ([], "short", "AMOEBA_SERVE_TOKEN has 5 characters; take 16 or more"),
        (["--host", "192.0.2.1"], "a-token-of-this-test", "192.0.2.1, port 0, cannot be listened on"),
        (["--decider", "largest"], "", "no decision named 'largest'. Did you mean 'largest_feasible'?"),
        (["--decider", "fixed", "--shape", "9x1"], "", "shape 9x1 is outside the space"),
        (["--shape", "3x1"], "", "--shape 3x1 is of --decider fixed, and largest_feasible decides"),
        (["--decider", "dual_head"], "", "name it by --decisions DIR"),
        (["--decisions", "nothing"], "", "nothing/compact.json"),
        (["--threads", "2"], "", "was measured with 1 threads, and --threads asks for 2"),
    ],
)
def test_what_cannot_be_served_is_refused(
    amoeba: Any, elastic: Path, profile: Path, options: list[str], token: str, words: str
):
    if "::" in options:
        words, token = "reached by other machines", ""
    done = amoeba(elastic, "--port", 0, "--profile", profile, *options, token=token)
    assert done.exit_code == 2
    assert words in re.sub(r"\s+", " ", done.output)


def test_a_port_that_is_taken_and_a_checkpoint_that_is_none_are_refused(
    amoeba: Any, elastic: Path, profile: Path, tmp_path: Path
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = amoeba(elastic, "--port", taken.getsockname()[1], "--profile", profile)
    assert done.exit_code == 2
    assert "cannot be listened on" in done.output
    done = amoeba(tmp_path, "--port", 0, "--profile", profile)
    assert done.exit_code == 2
    assert str(tmp_path) in re.sub(r"\s+", "", done.output)


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("example.org", False)],
)
def test_which_addresses_are_this_machines_own(host: str, local: bool):
    assert Door(host).is_local is local


def test_where_there_is_no_profile_one_is_made_once(elastic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resident, "SHAPES", 2)
    monkeypatch.setattr(resident, "ROUNDS", 1)
    subject, how = subject_of(str(elastic), None, [], []), How(tmp_path / "new" / "profile.json")
    (tmp_path / "new").mkdir()
    made = profile_for_service(subject, how, "elastic", progress=False)
    assert made.flows[FLOW].threads == 1
    written = how.profile.read_bytes()
    assert Profile.load(how.profile) == made
    predicted = profiled(made, FLOW)
    assert all(predicted(shape, 100).ttft > 0 and predicted(shape, 100).tpot > 0 for shape in subject.space)
    monkeypatch.setattr(resident, "profile_model", None)  # is not called again
    assert profile_for_service(subject, how, "elastic") == made
    assert how.profile.read_bytes() == written


def test_a_profile_of_another_model_or_machine_is_refused(elastic: Path, profile: Path, tmp_path: Path):
    subject, other = subject_of(str(elastic), None, [], []), tmp_path / "other.json"
    found = Profile.load(profile)
    found.model_copy(update={"digest": "of another"}).save(other)
    with pytest.raises(ArtifactError, match="is a profile of another model"):
        profile_for_service(subject, How(other), "elastic")
    found.model_copy(update={"machine": {"cpu": "another"}}).save(other)
    with pytest.raises(ArtifactError, match="is of another machine"):
        profile_for_service(subject, How(other), "elastic")
    other.write_text("{}")
    with pytest.raises(ArtifactError):
        profile_for_service(subject, How(other), "elastic")


def test_small_shapes_draft_where_the_profile_says_so(elastic: Path, profile: Path, tmp_path: Path):
    known = Profile.load(profile)
    pair = DraftedPair(drafter="2x1/2", target="4x1", acceptance=0.9, alone=10.0, drafted=20.0)
    live, _ = load_elastic(elastic)
    known.drafting = Drafting(fingerprint=live.strategy.fingerprint, ahead=3, pairs=[pair])
    known.save(tmp_path / "profile.json")
    said = []
    threads = torch.get_num_threads()
    for how in (How(tmp_path / "profile.json"), How(tmp_path / "profile.json", drafts=False), How(profile)):
        made = resident.make_resident(elastic, how, Limits())
        torch.set_num_threads(threads)
        with made.service:
            answer = made.service.ask(Request(range(3, 13), most=12))
            said.append([(each.token, each.log_probability) for each in answer])
        assert isinstance(made.backend, DraftingBackend) == (len(said) == 1)
        if isinstance(made.backend, DraftingBackend):
            assert made.backend.counts.drafted > 0
            assert made.backend.switches > 0
        assert str(answer.decision.shape) == "4x1"
    for one, other in zip(said[0], said[1], strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=1e-4)
    assert said[1] == said[2]


def test_a_compact_model_decides_and_shortens_prompts(elastic: Path, profile: Path, tmp_path: Path):
    live, _ = load_elastic(elastic)
    features, choices = Features(live, 0), Choices(tuple(live.space), (Fraction(1), Fraction(1, 2)))
    scores, decisions = ScoreHead(features.size), DecisionHead(features.size, choices)
    with torch.no_grad():
        for parameter in (*scores.parameters(), *decisions.parameters()):
            parameter.normal_(0, 0.3)
        decisions.usual.zero_()
        decisions.usual[list(live.space).index(SubnetShape.parse("3x1/2")), 1] = 1e4  # is right about every prompt
    tuned = Tuned(questions=1, labels="random", explained=0, nats=0, cpu_seconds=0, right=[])
    save_compact(CompactModel(features, scores, decisions, choices), live.strategy.fingerprint, tuned, tmp_path)
    threads = torch.get_num_threads()
    made = resident.make_resident(elastic, How(profile, decisions=tmp_path), Limits())
    torch.set_num_threads(threads)
    with made.service:
        answer = made.service.ask(Request(range(3, 23), most=2, droppable=range(10)))
        assert list(answer)
    assert str(answer.decision.shape) == "3x1/2"
    assert len(answer.kept) == 11  # what is right on half of it is taken to be right on less, and that is lighter
    assert list(answer.kept)[-10:] == [*range(10, 20)]


def test_the_command_is_offered_and_its_page_prints_options_that_exist():
    if "amoeba-http-service" not in {each.name for each in importlib.metadata.distributions()}:
        pytest.skip("amoeba-http-service is not installed, only on the path")
    offered = {each.name: each.function for each in offered_commands()}
    assert offered["serve"] is serve
    app = typer.Typer()
    app.command()(serve)
    known = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    printed = [shlex.split(line, comments=True) for line in shell.splitlines() if "amoeba serve " in line]
    assert printed
    assert {word for line in printed for word in line if word.startswith("--")} <= known
