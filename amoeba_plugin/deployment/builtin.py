"""The flows that come with the package, through the same door as those of others."""

from __future__ import annotations

from collections.abc import Mapping

from amoeba_plugin.deployment.flow import DeploymentFlow
from amoeba_plugin.deployment.torch_flow import Torch
from amoeba_plugin.plugins.hooks import hookimpl


@hookimpl
def amoeba_deployment_flows() -> Mapping[str, DeploymentFlow]:
    """Return what torch computes."""
    flows = (Torch(),)
    return {flow.name: flow for flow in flows}
