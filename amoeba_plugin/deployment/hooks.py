"""The hooks by which engines, searchers and evaluators are handed over; the built-in ones use the same door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from amoeba_plugin.plugins.hooks import hookspec

if TYPE_CHECKING:
    from amoeba_plugin.deployment.flow import DeploymentFlow
    from amoeba_plugin.deployment.search.evaluators import Evaluator
    from amoeba_plugin.deployment.search.problem import Choice, Problem


@hookspec
def amoeba_deployment_flows() -> Mapping[str, DeploymentFlow]:  # type: ignore[empty-body]
    """Return flows by the name that stands in front of the scheme: ``llama-cpp``."""


@hookspec
def amoeba_searchers() -> Mapping[str, Callable[[Problem], Choice]]:  # type: ignore[empty-body]
    """Return searchers by the name that ``amoeba search --searcher`` takes."""


@hookspec
def amoeba_evaluators() -> Mapping[str, Evaluator]:  # type: ignore[empty-body]
    """Return what makes judges of shapes, by the name that ``amoeba search --evaluator`` takes."""
