"""What is deployed of a search's choices, where engines refuse some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amoeba_plugin.deployment import within
from amoeba_plugin.deployment.search.frontier import Candidate, Frontier
from amoeba_plugin.errors import DeploymentError, ShapeError

KEEPS = {"4x1": False, "3x1": True, "2x1": True, "4x1/2": True, "3x1/2": True}  # the best first


def found() -> Frontier:
    candidates = [Candidate.model_construct(shape=shape, flow="e:q", keeps=keeps) for shape, keeps in KEEPS.items()]
    return Frontier.model_construct(budget="e:q decode<=1ms", chosen="2x1", flow="e:q", candidates=candidates)


@pytest.mark.parametrize(
    ("refused", "tried"),
    [((), ["2x1"]), (("2x1",), ["2x1", "3x1"]), (("2x1", "3x1"), ["2x1", "3x1", "4x1/2"]),
     (("2x1", "3x1", "4x1/2"), ["2x1", "3x1", "4x1/2"])],
)  # fmt: skip
def test_the_chosen_one_is_deployed_then_the_best_of_those_that_keep_the_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: tuple[str, ...], tried: list[str]
) -> None:
    seen: list[str] = []

    def deploy(elastic: Path, shape: str, flow: str, output: Path, base: str | None) -> Any:
        seen.append(shape)
        if shape in refused:
            raise DeploymentError(f"{shape} is too odd")
        return f"{shape} in {output.name}"

    monkeypatch.setattr(within, "deploy_shape", deploy)
    if len(refused) == 3:
        with pytest.raises(
            DeploymentError, match="none of the best choices within e:q decode<=1ms can be deployed: 2x"
        ):
            within.deploy_best(tmp_path, found(), tmp_path / "out")
    else:
        best = within.deploy_best(tmp_path, found(), tmp_path / "out")
        assert (best.choice.shape, best.deployed) == (tried[-1], f"{tried[-1]} in out")
        assert [(each.shape, each.why) for each in best.skipped] == [(each, f"{each} is too odd") for each in refused]
    assert seen == tried


def test_an_error_that_is_not_the_engines_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def deploy(*_: Any) -> Any:
        raise ShapeError("no such shape")

    monkeypatch.setattr(within, "deploy_shape", deploy)
    with pytest.raises(ShapeError):
        within.deploy_best(tmp_path, found(), tmp_path / "out")
