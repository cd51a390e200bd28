"""The adapters that come with the package."""

from __future__ import annotations

from collections.abc import Sequence

from amoeba_plugin.architecture import ArchitectureAdapter
from amoeba_plugin.architectures.llama import LlamaFamily
from amoeba_plugin.hookspecs import hookimpl


@hookimpl
def amoeba_architectures() -> Sequence[ArchitectureAdapter]:
    """Return the Llama family."""
    return (LlamaFamily(),)
