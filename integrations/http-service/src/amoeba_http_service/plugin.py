"""What this package hands to amoeba_plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from amoeba_http_service.command import serve
from amoeba_plugin import hookimpl


@hookimpl
def amoeba_commands() -> Mapping[str, Callable[..., None]]:
    """Return ``amoeba serve``."""
    return {"serve": serve}
