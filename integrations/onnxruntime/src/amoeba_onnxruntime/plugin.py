"""What this package hands to amoeba_plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amoeba_plugin import hookimpl


@hookimpl
def amoeba_deployment_flows() -> Mapping[str, Any]:
    """Return the flow ``onnxruntime``."""
    from amoeba_onnxruntime.flow import OnnxRuntime

    return {OnnxRuntime.name: OnnxRuntime()}
