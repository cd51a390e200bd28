"""What `amoeba profile` was asked for, read: a model, a space, flows."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from amoeba_plugin.deployment.flow import DeploymentFlow, Point
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.elastic.checkpoint import adapter_config
from amoeba_plugin.elastic.record import ELASTIC_NAME, read_record
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import DeploymentError, RecipeError
from amoeba_plugin.runtime.model_files import load_config
from amoeba_plugin.shape import ShapeSpace, parse_depth, parse_width

WIDTHS = tuple(Fraction(n, 8) for n in (8, 7, 6, 5, 4))
MOST_TOKENS, LONGEST = 10**7, 256  # of a prompt, possible and by default
DEEPEST = 9  # depths that a space has where none are given: at even distances, down to half the layers


def subject_of(
    model: str, strategy: Path | None, depths: Sequence[str], widths: Sequence[str], base: str | None = None
) -> Subject:
    """Return the model that is to be profiled.

    Args:
        model: Path or hub id of a model, or an elastic checkpoint, which has sizes and space of its own.
        strategy: Elastic checkpoint, or directory with ``strategy.json``: its sizes and space.
        depths: Of the space; empty: down to half the layers.
        widths: Of the space; empty: down to a half, by eighths.
        base: Where an elastic checkpoint's base is now, if it moved.

    Raises:
        RecipeError: If a space is given for a strategy, which has its own.
        ShapeError: If a depth or width is none.
    """
    adapted = None
    if (Path(model) / ELASTIC_NAME).is_file():
        adapted = adapter_config(Path(model))
        strategy, model = Path(model), base or read_record(Path(model)).base_of(Path(model))
    config = load_config(model)
    if strategy is not None:
        if depths or widths:
            raise RecipeError("a strategy has depths and widths of its own; leave out --depths and --widths")
        found = SubnetStrategy.load(strategy)
        return Subject.of(config, found.space, found, adapted)
    space = ShapeSpace(
        tuple(parse_depth(depth) for depth in depths) or _down_to_half(config.num_hidden_layers),
        tuple(parse_width(width) for width in widths) or WIDTHS,
    )
    return Subject.of(config, space)


def flows_of(points: Sequence[str]) -> dict[Point, DeploymentFlow]:
    """Return flows by the points that were named.

    Raises:
        DeploymentError: If none is, or a scheme is unknown.
        PluginError: If a flow is unknown.
    """
    if not points:
        raise DeploymentError("no flow is named; write --flow torch:fp32, or several of them")
    return {point: flow for flow, point in map(point_named, points)}


def prompts_of(texts: Sequence[str], subject: Subject, decoded: int) -> tuple[int, ...]:
    """Return lengths of prompts; where none are given, three that the model has room for.

    Raises:
        DeploymentError: If one is no number of tokens.
    """
    if not texts:
        longest = min(LONGEST, getattr(subject.config, "max_position_embeddings", LONGEST) - decoded)
        return tuple(max(longest // share, 1) for share in (8, 2, 1))
    wrong = next((text for text in texts if not text.isdecimal() or not 1 <= int(text) <= MOST_TOKENS), None)
    if wrong is not None:
        raise DeploymentError(f"'{wrong}' is no length of a prompt; write tokens, such as 32,128,256")
    return tuple(sorted({int(text) for text in texts}))


def _down_to_half(layers: int) -> tuple[float, ...]:
    least, count = (layers + 1) // 2, min(DEEPEST, layers - (layers + 1) // 2 + 1)
    return tuple(layers - (layers - least) * number // max(count - 1, 1) for number in range(count))
