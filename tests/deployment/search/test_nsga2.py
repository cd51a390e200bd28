"""NSGA-II by Optuna: nearly the best in few evaluations, again and again from where it was, by several processes."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from amoeba_plugin.deployment.search.finalists import measure_schemes, settle
from amoeba_plugin.deployment.search.nsga2 import nsga2
from amoeba_plugin.deployment.search.problem import Problem
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.errors import ArtifactError, PluginError
from amoeba_plugin.shape import SubnetShape
from support.landscapes import landscape
from support.shared_search import search_in_steps, watched

DIES_AFTER = 6  # shapes; processes draw by their number, and some judge no more than twelve


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("amoeba_plugin.deployment.search.nsga2.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"needs Optuna: pip install 'amoeba-plugin\[search\]'"):
        nsga2(landscape(0)[0])


def test_nearly_the_best_shape_and_scheme_with_few_shapes_evaluated(capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("optuna")
    near, evaluated = [], []
    for seed in range(10):
        problem, true = landscape(seed)
        problem.trials = 120
        measure_schemes(problem)
        nsga2(problem)
        found = settle(problem, 100).finalists[0]
        near.append(true[found] - min(true.values()) < 0.05)
        evaluated.append(len(problem.qualities) / len(problem.space))
    assert sum(near) >= 0.9 * len(near)
    assert max(evaluated) < 1
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_what_exceeds_the_budget_is_not_evaluated():
    pytest.importorskip("optuna")
    problem, true = landscape(4, "Q8_0")
    seen = watched(problem)
    nsga2(problem)
    assert seen
    assert set(seen) <= {choice.shape for choice in true}
    assert len(seen) == len(set(seen))


def test_a_search_that_was_killed_goes_on(tmp_path: Path):
    pytest.importorskip("optuna")
    killed, _ = landscape(2)
    killed.storage, killed.trials = tmp_path / "trials.journal", 60
    before = watched(killed, dies_after=DIES_AFTER)
    with pytest.raises(KeyboardInterrupt):
        nsga2(killed)
    again, true = landscape(2)
    again.storage, again.trials = killed.storage, 60
    after = watched(again)
    choice = nsga2(again)
    assert not set(before[:DIES_AFTER]) & set(after), "what was judged is not judged again"
    assert set(before[:DIES_AFTER]) <= again.qualities.keys()
    assert choice in true
    assert nsga2(again) == choice
    third, _ = landscape(2)
    third.storage, third.trials = killed.storage, 60
    assert watched(third) == []
    assert nsga2(third) == choice
    assert third.qualities == again.qualities, "intervals and samples too"


def test_another_search_in_the_same_file_is_another(tmp_path: Path):
    pytest.importorskip("optuna")
    for name in ("one", "another"):
        problem, _ = landscape(3)
        problem.storage, problem.name, problem.trials = tmp_path / "trials.journal", name, 10
        nsga2(problem)
        assert problem.qualities.keys() <= {choice.shape for choice in problem.choices()}
        problem.evaluate = unexpected
        nsga2(problem)


def unexpected(shape: SubnetShape) -> Quality:
    raise AssertionError(f"{shape} was judged before")


def test_several_processes_share_a_search(tmp_path: Path):
    pytest.importorskip("optuna")
    storage = tmp_path / "trials.journal"
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        seen = list(pool.map(search_in_steps, [(5, str(storage), 90)] * 2))
    optuna = pytest.importorskip("optuna")
    backend = optuna.storages.journal.JournalFileBackend(str(storage))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert 90 <= len(done) <= 91
    assert all(seen), "both judged shapes"
    judged = [shape for each in seen for shape in each]
    assert len(judged) - len(set(judged)) <= 0.3 * len(judged), "what one judged, others take over"


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path):
    pytest.importorskip("optuna")
    (tmp_path / "notes.txt").write_text("nothing of the kind\nat all\n")
    problem: Problem = landscape(0)[0]
    problem.storage = tmp_path / "notes.txt"
    with pytest.raises(ArtifactError, match="no journal of trials"):
        nsga2(problem)
    assert (tmp_path / "notes.txt").read_text() == "nothing of the kind\nat all\n"
