"""The hook by which engines are handed over; the built-in ones use the same door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from amoeba_plugin.plugins.hooks import hookspec

if TYPE_CHECKING:
    from amoeba_plugin.deployment.flow import DeploymentFlow


@hookspec
def amoeba_deployment_flows() -> Mapping[str, DeploymentFlow]:  # type: ignore[empty-body]
    """Return flows by the name that stands in front of the scheme: ``llama-cpp``."""
