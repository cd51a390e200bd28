"""The flows, searchers and evaluators that come with the package, through the same door as those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from amoeba_plugin.deployment.flow import DeploymentFlow
from amoeba_plugin.deployment.search.evaluators import Evaluator, accuracy, loss
from amoeba_plugin.deployment.search.exhaustive import exhaustive
from amoeba_plugin.deployment.search.hierarchical import hierarchical
from amoeba_plugin.deployment.search.nsga2 import nsga2
from amoeba_plugin.deployment.search.problem import Choice, Problem
from amoeba_plugin.deployment.torch_flow import Torch
from amoeba_plugin.plugins.hooks import hookimpl


@hookimpl
def amoeba_deployment_flows() -> Mapping[str, DeploymentFlow]:
    """Return what torch computes."""
    flows = (Torch(),)
    return {flow.name: flow for flow in flows}


@hookimpl
def amoeba_searchers() -> Mapping[str, Callable[[Problem], Choice]]:
    """Return the three there are; the last one needs Optuna, once it is run."""
    return {search.__name__: search for search in (hierarchical, exhaustive, nsga2)}


@hookimpl
def amoeba_evaluators() -> Mapping[str, Evaluator]:
    """Return held-out loss and accuracy on multiple-choice questions."""
    return {"loss": loss, "accuracy": accuracy}
