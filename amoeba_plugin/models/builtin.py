"""The adapters that come with the package."""

from __future__ import annotations

from collections.abc import Sequence

from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.architectures.classic import OPT, GPTNeoX
from amoeba_plugin.models.architectures.gemma import Gemma
from amoeba_plugin.models.architectures.granite import SwitchedBiases
from amoeba_plugin.models.architectures.llama import LlamaFamily
from amoeba_plugin.models.architectures.moe import MixtureOfExperts
from amoeba_plugin.models.architectures.olmo2 import Olmo2
from amoeba_plugin.models.architectures.phi3 import Phi3
from amoeba_plugin.plugins.hooks import hookimpl


@hookimpl
def amoeba_architectures() -> Sequence[ArchitectureAdapter]:
    """Return one adapter per design."""
    return (LlamaFamily(), SwitchedBiases(), Olmo2(), Phi3(), Gemma(), GPTNeoX(), OPT(), MixtureOfExperts())
