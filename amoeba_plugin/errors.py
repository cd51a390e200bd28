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
    ├── DeploymentError    an engine that is missing, cannot hold a subnet, fails, crashes or does not answer
    ├── BudgetError        a budget that is none, contradicts itself, or that no shape keeps
    ├── SloError           a request's targets for time that are none, contradict each other, or that no shape keeps
    │   └── BusyError      targets that no shape keeps behind the requests that were taken before: later one may
    ├── ServiceError       a service that takes no more requests: it is closing, or too many wait
    └── PluginError        a name that nobody registered, or that two plugins registered

Every message says what was asked, what is possible, and what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST_WORD, LONGEST_MESSAGE = 400, 8000  # characters; a path may be long, what a user wrote can be endless
KEPT_OF_A_WORD, QUOTING = 60, "'\":,;)"


def shortened(message: str) -> str:
    """Return a message in which endless words are cut, and which is cut in its middle where it is endless itself.

    What is asked for stands at the beginning of a message, what to do at its end.

    >>> shortened(f"depth {'9' * 5000}: a subnet keeps at least 1 layer")[60:]
    '999999... (5001 characters): a subnet keeps at least 1 layer'
    """
    words = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", _cut_word, message)
    side = LONGEST_MESSAGE // 2
    return words if len(words) <= LONGEST_MESSAGE else f"{words[:side]} [...] {words[-side:]}"


def _cut_word(found: re.Match[str]) -> str:
    word = found[0]
    return f"{word[:KEPT_OF_A_WORD]}... ({len(word)} characters){word[len(word.rstrip(QUOTING)) :]}"


class AmoebaError(Exception):
    """Base of all errors of this package; ``except AmoebaError`` catches what a user can put right.

    Args:
        message: For people; what it repeats of their input is cut where it is endless.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message)))


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


class DeploymentError(AmoebaError, RuntimeError):
    """An engine that is not installed, cannot hold a subnet, fails, crashes or does not answer."""


class BudgetError(AmoebaError, ValueError):
    """A budget without units, that contradicts itself, or that no shape of a space keeps."""


class SloError(AmoebaError, ValueError):
    """A request's targets for time that cannot be parsed, or that no shape keeps."""


class BusyError(SloError):
    """A request's targets that no shape keeps behind what was taken before it."""


class ServiceError(AmoebaError, RuntimeError):
    """A service that takes no more requests."""


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
