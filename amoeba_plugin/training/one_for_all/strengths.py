"""How much of a trained adapter every shape takes: what helps small shapes may be too much for those near the whole.

One training moves all shapes, and a shape that lost little by being cut out has little to win: it can end worse than it
began. Weights between those before and after a training are often better than either (WiSE-FT, Wortsman et al.,
arXiv:2109.01903, section 3), and an adapter's scale is that path. So each shape gets its own, on text that was not
trained on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from peft import PeftModel
from tqdm import tqdm

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.runtime.ranks import from_first_rank, rank
from amoeba_plugin.selection.objectives import PerTokenLoss
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol import SmolConfig

logger = logging.getLogger(__name__)
TRIED = (0.0, 0.5, 1.0)


def fit_strengths(elastic: ElasticModel, peft_model: PeftModel, batches: Sequence[Batch]) -> dict[str, float]:
    """Set the strength of every shape to that in [0, 1] which loses least; the configuration keeps them.

    Loss is measured at no, half and the whole strength, and where a parabola through the three is lowest; the least of
    those that were measured is taken, the stronger of equal ones. So no shape is worse on this text than without the
    adapter, or at its whole strength. The shape that is active stays so.

    Args:
        elastic: At any shape.
        peft_model: The SMOL adapter on it; where it leaves the largest shape alone, so does this.
        batches: Text that was not trained on.

    Returns:
        Shape -> strength, two digits, of those below 1.
    """
    config = peft_model.active_peft_config
    assert isinstance(config, SmolConfig)
    shapes = [shape for shape in elastic.space if config.adapt_largest or shape != elastic.space.largest]
    found: dict[str, float] = {}
    for shape in tqdm(shapes, "strength of shapes", unit="shape", disable=rank() > 0):
        found[str(shape)] = _strength(elastic, config, shape, batches)
        config.strengths.pop(str(shape), None)
    agreed = from_first_rank(json.dumps({shape: each for shape, each in found.items() if each < 1}).encode())
    config.strengths = json.loads(agreed or b"{}")
    elastic.set_shape(elastic.shape)  # the router reads them when a shape is set
    told = ", ".join(f"{shape} {strength:g}" for shape, strength in config.strengths.items())
    logger.info("strength of the adapter: %s", f"{told}; 1 elsewhere" if told else "1 at every shape")
    return config.strengths


def _strength(elastic: ElasticModel, config: SmolConfig, shape: SubnetShape, batches: Sequence[Batch]) -> float:
    losses: dict[float, float] = {}

    def measure(strength: float) -> float:
        config.strengths[str(shape)] = strength
        with elastic.active(shape) as model:
            losses[strength] = PerTokenLoss().measure(model, batches).value
        return losses[strength]

    measure(lowest_of_parabola(*(measure(strength) for strength in TRIED)))
    return min(losses, key=lambda strength: (losses[strength], -strength))


def lowest_of_parabola(none: float, half: float, whole: float) -> float:
    """Return where in [0, 1] a parabola through three losses is lowest, two digits.

    >>> lowest_of_parabola(0.25, 0.0, 0.25), lowest_of_parabola(3.0, 2.0, 1.0), lowest_of_parabola(0.0, 1.0, 1.0)
    (0.5, 1.0, 0.0)

    Args:
        none: Loss at 0.
        half: At 1/2.
        whole: At 1.
    """
    # l(s) = none + b s + a s^2 with a = 2 (none - 2 half + whole), b = 4 half - 3 none - whole; lowest at -b / 2a
    a, b = 2 * (none - 2 * half + whole), 4 * half - 3 * none - whole
    if a <= 0:
        return float(whole <= none)
    return round(min(1.0, max(0.0, -b / (2 * a))), 2)
