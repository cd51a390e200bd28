"""Commands of integrations: those installed run, those that are not say what to install, a broken one is named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from amoeba_plugin.cli import AmoebaGroup
from amoeba_plugin.plugins.commands import Integration, offered_commands

GREETING = '''
from typing import Annotated
import typer
from amoeba_plugin import hookimpl


def greet(name: str, loud: Annotated[bool, typer.Option(help="Shout.")] = False) -> None:
    """Greet somebody."""
    typer.echo(f"hello {name}".upper() if loud else f"hello {name}")


@hookimpl
def amoeba_commands():
    return {"greet": greet}
'''
Amoeba = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def amoeba(tmp_path: Path) -> Amoeba:
    """Run ``amoeba`` where one integration is installed: a module and what pip writes beside it."""

    def amoeba(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "amoeba_greeting.py").write_text(program)
        metadata = tmp_path / "amoeba_greeting-1.0.dist-info"
        metadata.mkdir(exist_ok=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: amoeba-greeting\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("[amoeba_plugin]\ngreeting = amoeba_greeting\n")
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "amoeba_plugin", *arguments]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)

    return amoeba


def test_an_installed_command_is_one_of_amoebas(amoeba: Amoeba) -> None:
    assert "Greet somebody." in amoeba(GREETING, "--help").stdout
    assert amoeba(GREETING, "greet", "world", "--loud").stdout == "HELLO WORLD\n"
    assert "Missing argument" in amoeba(GREETING, "greet").stderr


def test_a_plugin_that_cannot_be_imported_is_named(amoeba: Amoeba) -> None:
    done = amoeba("import a_package_that_is_not_there", "recipes", "list")
    assert done.returncode == 2
    assert done.stderr.startswith("error: a plugin of the entry point group amoeba_plugin cannot be loaded")
    assert "a_package_that_is_not_there" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_of_an_integration_that_is_not_there_says_what_to_install() -> None:
    app = typer.Typer(cls=AmoebaGroup)
    app.callback()(lambda: None)
    for offered in offered_commands({"sing": Integration("amoeba-singing", "Sing a song.")}):
        app.command(offered.name, help=offered.help, context_settings=offered.settings)(offered.function)
    listed = CliRunner().invoke(app, ["--help"])
    assert "Sing a song. Not installed: pip install amoeba-singing" in " ".join(listed.output.split())
    for arguments in ([], ["louder", "--twice"], ["--help"]):
        result = CliRunner().invoke(app, ["sing", *arguments])
        assert result.exit_code == 2
        assert "amoeba sing comes with amoeba-singing, which is not installed: pip install" in result.stderr
