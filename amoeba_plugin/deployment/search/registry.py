"""Searchers and evaluators by name."""

from __future__ import annotations

from collections.abc import Callable

from amoeba_plugin.deployment.search.evaluators import Evaluator
from amoeba_plugin.deployment.search.problem import Choice, Problem
from amoeba_plugin.plugins.manager import named

Searcher = Callable[[Problem], Choice]


def searcher_named(name: str) -> Searcher:
    """Return the searcher of that name, or raise :class:`PluginError` with the names that exist."""
    found: Searcher = named("searcher", "amoeba_searchers", name)
    return found


def evaluator_named(name: str) -> Evaluator:
    """Return the evaluator of that name, or raise :class:`PluginError` with the names that exist."""
    found: Evaluator = named("evaluator", "amoeba_evaluators", name)
    return found
