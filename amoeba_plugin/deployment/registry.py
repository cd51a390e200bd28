"""Flows by name, and the points that users write; of one that an integration brings the error says what to install."""

from __future__ import annotations

from collections.abc import Mapping

from amoeba_plugin.deployment.flow import DeploymentFlow, Point
from amoeba_plugin.errors import DeploymentError, PluginError
from amoeba_plugin.plugins.manager import collected, named

KIND, HOOK = "deployment flow", "amoeba_deployment_flows"

#: Flows of the folder ``integrations/``, by name: what ``pip install`` takes.
INTEGRATIONS: Mapping[str, str] = {"llama-cpp": "./integrations/llama-cpp", "onnxruntime": "./integrations/onnxruntime"}


def flow_named(name: str) -> DeploymentFlow:
    """Return the flow of a name.

    Raises:
        PluginError: If nobody registered it, with those that exist, and what to install where an integration has it.
    """
    try:
        found: DeploymentFlow = named(KIND, HOOK, name)
    except PluginError as error:
        missing = _missing()  # fails too where a plugin does, and says so
        if name in missing:
            raise PluginError(f"{name} is not installed: pip install {INTEGRATIONS[name]}") from error
        others = ", ".join(f"{each} (pip install {INTEGRATIONS[each]})" for each in sorted(missing))
        raise PluginError(f"{error}{f'; not installed: {others}' if others else ''}") from error
    return found


def point_named(text: str) -> tuple[DeploymentFlow, Point]:
    """Return the flow of ``flow:scheme``, and the point.

    Raises:
        DeploymentError: If the text is no such thing, or the flow has not the scheme.
        PluginError: If nobody registered the flow.
    """
    if ":" not in text:
        flow = flow_named(text.strip())
        raise DeploymentError(
            f"'{text}' names no scheme; write one of {', '.join(f'{flow.name}:{each}' for each in flow.schemes)}"
        )
    point = Point.parse(text)
    flow = flow_named(point.flow)
    flow.require_scheme(point.scheme)
    return flow, point


def installed_flows() -> dict[str, DeploymentFlow]:
    """Return the flows that are there, by name."""
    found: dict[str, DeploymentFlow] = collected(KIND, HOOK)
    return found


def _missing() -> set[str]:
    return set(INTEGRATIONS) - set(installed_flows())
