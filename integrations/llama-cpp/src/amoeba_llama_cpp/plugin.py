"""What this package hands to amoeba_plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amoeba_plugin import hookimpl


@hookimpl
def amoeba_deployment_flows() -> Mapping[str, Any]:
    """Return the flow ``llama-cpp``."""
    from amoeba_llama_cpp.flow import LlamaCpp

    return {LlamaCpp.name: LlamaCpp()}
