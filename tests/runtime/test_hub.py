"""A model that is not here: the hub is asked once, and what it says, or that it is silent, is told."""

from __future__ import annotations

from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.runtime.hub import require_answering
from amoeba_plugin.runtime.model_files import load_config
from support.recipes import GOOD, config_of

COMMANDS = {
    "run": ["run", "RECIPE", "--dataset", "TEXT", "--model", "no/such-model", "-o", "OUT"],
    "check": ["check", "RECIPE", "--model", "no/such-model"],
    "profile": ["profile", "no/such-model", "--flow", "torch:fp32", "-o", "OUT"],
    "fit": ["fit", "no/such-model", "--dataset", "TEXT", "--budget", "torch:fp32 file<=1MB", "-o", "OUT"],
    "loads": ["loads", "2x1", "--model", "no/such-model", "--flow", "torch"],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Questions to a hub that no network leads to; the cache is empty."""
    found: list[str] = []

    def unreachable(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        found.append(request.url.path)
        raise httpx.ConnectError("no way there", request=request)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", unreachable)
    huggingface_hub.close_session()
    return found


def of_models(asked: list[str]) -> list[str]:
    return [each for each in asked if each.endswith("config.json")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_that_is_silent_is_asked_once(command: str, asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    (tmp_path / "text.jsonl").write_text('{"text": "some words"}\n')
    places = {"RECIPE": "recipe.yaml", "TEXT": "text.jsonl", "OUT": "out"}
    words = [str(tmp_path / places[word]) if word in places else word for word in COMMANDS[command]]
    result = CliRunner().invoke(app, words)
    told = " ".join(result.output.split())
    assert result.exit_code == 2, told
    assert of_models(asked) == ["/no/such-model/resolve/main/config.json"]
    assert "the model 'no/such-model' cannot be loaded: there is no such directory, and as a hub id" in told
    assert "does not answer (no way there), and nothing of it is in the cache." in told
    assert "Give a directory that save_pretrained wrote, or a hub id" in told
    assert not (tmp_path / "out").exists()


def test_what_is_here_asks_nobody(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for name in ("model", str(tmp_path / "model")):
        assert load_config(name).model_type == "llama"
    with pytest.raises(ArchitectureError, match="there is no such directory"):
        load_config(str(tmp_path / "misspelt"))
    assert of_models(asked) == []


def test_what_is_in_the_cache_is_loaded_without_a_network(asked: list[str]) -> None:
    snapshot = Path(constants.HF_HUB_CACHE) / "models--some--model"
    config_of().save_pretrained(snapshot / "snapshots" / "0123")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("0123")
    assert file_download.try_to_load_from_cache("some/model", "config.json") is not None
    require_answering("some/model")
    assert of_models(asked) == []


@pytest.mark.parametrize(("status", "refused"), [(404, False), (401, False), (503, True), (429, True)])
def test_what_the_hub_says_is_left_to_who_loads(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, status: int, refused: bool
) -> None:
    def answer(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(status, request=request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", answer)
    if refused:
        with pytest.raises(OSError, match="does not answer"):
            require_answering("some/model")
    else:
        require_answering("some/model")
    assert len(of_models(asked)) == 1


def test_the_offline_mode_asks_nobody(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require_answering("some/model")
    assert asked == []
