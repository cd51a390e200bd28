"""Everything this package raises on purpose.

::

    AmoebaError
    ├── RecipeError        a recipe that cannot run: unknown key, impossible order, a value out of range
    ├── ShapeError         a subnet shape that the space does not hold
    ├── ArchitectureError  a model that cannot be made elastic: unsupported, quantized already
    ├── DataError          calibration, training or evaluation data that is missing, empty or too short
    ├── ArtifactError      a file that is truncated, foreign, of another model or another version
    ├── ConfigError        an adapter configuration that contradicts itself
    ├── AdapterError       an adapter that does not fit the model or the space it is put on
    ├── TrainingError      training that cannot go on: a loss that is not finite, no target token
    └── PluginError        a name that nobody registered, or that two plugins registered

Every message says what was asked, what is possible, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AmoebaError(Exception):
    """Base of all errors of this package; ``except AmoebaError`` catches what a user can put right."""


class RecipeError(AmoebaError, ValueError):
    """A recipe, or one field of it, that cannot run."""


class ShapeError(AmoebaError, ValueError):
    """A subnet shape that cannot be parsed or is outside the space."""


class ArchitectureError(AmoebaError, ValueError):
    """A model whose parts cannot be given roles, or that is already quantized."""


class DataError(AmoebaError, ValueError):
    """Data that is missing, empty, too short, or lacks what an objective needs."""


class ArtifactError(AmoebaError, ValueError):
    """A file that is truncated, foreign, of another model, or of another version."""


class ConfigError(AmoebaError, ValueError):
    """An adapter configuration that contradicts itself."""


class AdapterError(AmoebaError, ValueError):
    """An adapter that does not fit the model or the space it is put on."""


class TrainingError(AmoebaError, RuntimeError):
    """Training that cannot go on."""


class PluginError(AmoebaError, LookupError):
    """A name that no plugin registered, or that two plugins registered."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the known name next to a wrong one, or nothing where none is near.

    >>> did_you_mean("Demos", ["demo", "qwen3"])
    " Did you mean 'demo'?"
    """
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""
