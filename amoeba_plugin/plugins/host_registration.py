"""Registers with PEFT and llm-compressor when *they* are imported, so that importing this package costs nothing.

``import amoeba_plugin`` alone must be enough for ``peft.PeftModel.from_pretrained`` and ``llmcompressor.oneshot`` to
know what is ours. Importing both hosts to tell them takes seconds, and a PEFT user has no need of llm-compressor. So a
finder waits in ``sys.meta_path`` for either name, lets Python import the host, and registers right after.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTERS = {"peft": "amoeba_plugin.smol", "llmcompressor": "amoeba_plugin.modifiers"}  # importing the value registers


def register_with_hosts() -> None:
    """Register with the hosts that are imported already, and with the others as soon as they are."""
    waiting = {host: ours for host, ours in REGISTERS.items() if host not in sys.modules}
    if waiting and not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HostFinder())
    for host, ours in REGISTERS.items():
        if host not in waiting:
            importlib.import_module(ours)


class _HostFinder(MetaPathFinder):
    """Finds a host with Python's own finders, and wraps its loader once."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a host's spec with a loader that registers afterwards; ``None`` for every other name."""
        if name not in REGISTERS or self._searching:
            return None
        self._searching = True  # find_spec asks all finders, this one too
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, REGISTERS[name])
        return spec


class _RegisteringLoader(Loader):
    """Loads a host as its own loader does, then imports the module that registers with it."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self._loader, self._ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the host's loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the host, give it its own loader back, register."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        importlib.import_module(self._ours)
