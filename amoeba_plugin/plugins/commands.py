"""Commands that integrations add to ``amoeba``; of one that is not installed the command says what to install."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from amoeba_plugin.errors import PluginError
from amoeba_plugin.plugins.manager import collected

ANY_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@dataclass(frozen=True)
class Integration:
    """A package of the folder ``integrations/`` whose command shall appear before it is installed.

    Attributes:
        package: What ``pip install`` takes.
        does: What its command does, in a sentence.
    """

    package: str
    does: str


#: By command; an integration that comes with a command adds its line.
INTEGRATIONS: Mapping[str, Integration] = {
    "evaluate": Integration("./integrations/lm-eval", "Score models, shapes and deployed subnets by lm_eval's tasks."),
    "serve": Integration(
        "./integrations/http-service", "Serve an elastic model by HTTP, each request in its own time."
    ),
}


@dataclass(frozen=True)
class OfferedCommand:
    """A command for Typer.

    Attributes:
        name: Its name.
        function: Its annotations are its arguments and options.
        help: In place of the function's docstring.
        settings: Typer's ``context_settings``.
    """

    name: str
    function: Callable[..., None]
    help: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def offered_commands(known: Mapping[str, Integration] = INTEGRATIONS) -> Iterator[OfferedCommand]:
    """Yield the commands of installed plugins, and a stand-in for each of an integration that is not there.

    Args:
        known: Integrations by the command that they bring.

    Raises:
        PluginError: If a plugin cannot be loaded, or two give a command of the same name.
    """
    installed = collected("command", "amoeba_commands")
    for name, function in installed.items():
        yield OfferedCommand(name, function)
    for name, integration in known.items():
        if name not in installed:
            yield _stand_in(name, integration)


def _stand_in(name: str, integration: Integration) -> OfferedCommand:
    install = f"pip install {integration.package}"

    def refuse() -> None:
        raise PluginError(f"amoeba {name} comes with {integration.package}, which is not installed: {install}")

    return OfferedCommand(name, refuse, f"{integration.does} Not installed: {install}", ANY_ARGUMENTS)
