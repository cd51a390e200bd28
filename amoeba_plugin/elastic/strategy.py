"""SubnetStrategy: which layers every depth keeps and in which order every group's units are kept; on disk and in
memory.

``strategy.json`` holds all a person may want to read, ``strategy.safetensors`` orders, mean inputs and repaired
weights. Both are written atomically, the JSON last: a killed run leaves the old pair or no JSON, and the JSON names the
digest of its tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.repairs import Repairs
from amoeba_plugin.elastic.strategy_document import (
    StrategyDocument,
    first_fault,
    require_depths,
    require_tensors,
    require_units,
)
from amoeba_plugin.errors import ArtifactError, RecipeError, ShapeError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.fingerprint import Loaded, model_fingerprint, same_model
from amoeba_plugin.models.kept import Kept, read_kept, write_kept
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.shape import ShapeSpace, half_steps, parse_depth, parse_width, require_distinct_depths

FORMAT, VERSION = "amoeba_plugin.SubnetStrategy", 3
SUBLAYERS_VERSION = 2  # written where nothing is repaired, so that older versions of this package read it
WHOLE_LAYERS_VERSION = 1  # and every layer kept is whole
JSON_NAME, TENSORS_NAME = "strategy.json", "strategy.safetensors"


@dataclass(frozen=True)
class DepthStrategy:
    """For each depth the layers kept, ascending; depths need not be nested.

    Attributes:
        kept: Indices of the layers of which anything is kept.
        objective: What was made least, by its name; empty where no objective was measured.
        metric: What the objective measured for each depth on the calibration data; empty where nothing was measured.
        search: How the search went, for people.
        lost: For depths that keep layers in part: by layer the sublayer that it has lost, "attention" or "mlp". Each is
            half a layer of the depth.
        selector: What chose them; empty where they were given.
    """

    kept: Mapping[float, tuple[int, ...]]
    objective: str = ""
    metric: Mapping[float, float] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict, compare=False)
    lost: Mapping[float, Mapping[int, str]] = field(default_factory=dict)
    selector: str = ""

    @classmethod
    def given(cls, kept: Mapping[str, Sequence[Kept]], num_layers: int) -> DepthStrategy:
        """Return a strategy written by hand or by an earlier run.

        Args:
            kept: Per depth, as text, the layers to keep, ``[0, "2.mlp", 3]`` at depth 2.5; the whole model is added
                where it is missing.
            num_layers: Layers of the model.

        Raises:
            RecipeError: If a depth does not keep as many different layers of the model as it says, or is written twice.
        """
        try:
            require_distinct_depths(kept)
        except ShapeError as error:
            raise RecipeError(f"kept_layers: {error}") from error
        layers: dict[float, tuple[int, ...]] = {num_layers: tuple(range(num_layers))}
        lost: dict[float, dict[int, str]] = {}
        for text, entries in kept.items():
            try:
                depth = parse_depth(text)
                layers[depth], gone = read_kept(entries)
                fits = len(layers[depth]) - len(gone) / 2 == depth and layers[depth][-1] < num_layers
            except (ShapeError, ValueError, IndexError):
                fits = False
            if not fits:
                raise RecipeError(
                    f"kept_layers: depth {text} keeps {list(entries)}; name {text} different layers out of "
                    f"0..{num_layers - 1}, of which 2.attention and 2.mlp are half a layer each"
                )
            if gone:
                lost[depth] = gone
        return cls(layers, lost=lost)

    @classmethod
    def whole(cls, num_layers: int) -> DepthStrategy:
        """Return the strategy of a model whose depth is not elastic."""
        return cls({num_layers: tuple(range(num_layers))})

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return int(max(self.kept))

    def listed(self, depth: float) -> list[Kept]:
        """Return what a depth keeps as it is written: indices, and ``"2.mlp"`` where that is all of layer 2."""
        return write_kept(self.kept[depth], self.lost.get(depth, {}))

    def removed(self, depth: float) -> list[Kept]:
        """Return what a depth removes: indices of layers, and ``"2.attention"`` where layer 2 keeps its MLP."""
        gone: list[Kept] = [index for index in range(self.num_layers) if index not in self.kept[depth]]
        return [*gone, *(f"{index}.{part}" for index, part in self.lost.get(depth, {}).items())]

    def only(self, depths: Collection[float]) -> DepthStrategy:
        """Return the strategy with some of its depths, and the whole model's."""

        def some(of: Mapping[float, Any]) -> dict[float, Any]:
            return {depth: each for depth, each in of.items() if depth in depths or depth == self.num_layers}

        return replace(self, kept=some(self.kept), metric=some(self.metric), lost=some(self.lost))

    @property
    def table(self) -> dict[str, list[Kept]]:
        """What :meth:`given` reads."""
        return {str(half_steps(depth)): self.listed(depth) for depth in self.kept}


@dataclass(frozen=True)
class WidthStrategy:
    """Per group ("3.attention") the order of its units, most important first, and how many each width keeps.

    Kept sets are nested: a width keeps a prefix of the order, so after one reordering every width is a prefix.
    """

    units: Mapping[Fraction, Mapping[str, int]]
    order: Mapping[str, Tensor] = field(default_factory=dict)  # (units,) int64
    mean_input: Mapping[str, Tensor] = field(default_factory=dict)  # (consumer's input channels,) fp32, original order
    importance: str = ""
    allocation: str = "uniform"
    bias_compensation: bool = False

    @classmethod
    def whole(cls) -> WidthStrategy:
        """Return the strategy of a model whose width is not elastic."""
        return cls({Fraction(1): {}})


@dataclass(frozen=True)
class SubnetStrategy:
    """Depth and width strategy of one model, which ``fingerprint`` identifies, and what was repaired of it;
    ``provenance`` is for people."""

    depth: DepthStrategy
    width: WidthStrategy
    fingerprint: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    repairs: Repairs = field(default_factory=Repairs)

    @property
    def space(self) -> ShapeSpace:
        """The grid of shapes that this strategy can cut."""
        return ShapeSpace(tuple(self.depth.kept), tuple(self.width.units))

    def require_model(self, model: PreTrainedModel, adapter: ArchitectureAdapter, loaded: Loaded = nullcontext) -> None:
        """Refuse a model that is not the one this strategy was made for.

        Args:
            model: The model.
            adapter: Its architecture.
            loaded: Has a layer's weights in memory for a block of code.

        Raises:
            ArtifactError: If the fingerprints differ.
        """
        found = model_fingerprint(model, adapter, loaded)
        if not same_model(found, self.fingerprint):
            raise ArtifactError(
                f"this strategy belongs to a model with fingerprint {self.fingerprint[:12]}, the model given has "
                f"{found[:12]}: other weights or another architecture. Load the model the selection ran on, "
                "or repeat the selection"
            )

    def save(self, directory: Path) -> None:
        """Write both files into a directory, which is made if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"order.{key}": value.contiguous() for key, value in self.width.order.items()}
        tensors |= {f"mean_input.{key}": value.contiguous() for key, value in self.width.mean_input.items()}
        tensors |= {f"repair.{name}": value for name, value in self.repairs.tensors().items()}
        data = save_tensors(tensors)
        document = {
            "format": FORMAT,
            "version": self._version,
            "fingerprint": self.fingerprint,
            "tensors_sha256": hashlib.sha256(data).hexdigest(),
            "depth": {
                "selector": self.depth.selector,
                "objective": self.depth.objective,
                "kept": self.depth.table,
                "metric": {str(depth): _finite_or_none(value) for depth, value in self.depth.metric.items()},
                "search": dict(self.depth.search),
            },
            "width": {
                "importance": self.width.importance,
                "allocation": self.width.allocation,
                "bias_compensation": self.width.bias_compensation,
                "units": {str(width): dict(units) for width, units in self.width.units.items()},
            },
            **({"repair": self.repairs.method} if self.repairs else {}),
            "provenance": dict(self.provenance),
        }
        write_atomically(directory / TENSORS_NAME, data)
        write_atomically(directory / JSON_NAME, json.dumps(document, indent=1, allow_nan=False).encode())

    @property
    def _version(self) -> int:
        if self.repairs:
            return VERSION
        return SUBLAYERS_VERSION if self.depth.lost else WHOLE_LAYERS_VERSION

    @classmethod
    def load(cls, directory: Path) -> SubnetStrategy:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: If a file is missing, truncated, foreign, from a newer version, or not of the same pair.
        """
        path = directory / JSON_NAME
        raw = _read_document(path)
        try:
            document = StrategyDocument.model_validate_json(json.dumps(raw))
        except ValidationError as error:
            raise ArtifactError(f"{path} is damaged ({first_fault(error)}); repeat the selection") from error
        tensors = _read_tensors(directory / TENSORS_NAME, document.tensors_sha256)
        try:
            return cls._from_document(document, tensors)
        except (ValueError, ZeroDivisionError, ShapeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); repeat the selection") from error

    @classmethod
    def _from_document(cls, document: StrategyDocument, tensors: dict[str, Tensor]) -> SubnetStrategy:
        depth, width = document.depth, document.width

        def named(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        kept = {parse_depth(key): read_kept(entries) for key, entries in depth.kept.items()}
        layers = {key: layers for key, (layers, _) in kept.items()}
        lost = {key: lost for key, (_, lost) in kept.items() if lost}
        metric = {parse_depth(key): math.nan if value is None else value for key, value in depth.metric.items()}
        units = {parse_width(key): units for key, units in width.units.items()}
        order, mean_input = named("order."), named("mean_input.")
        require_depths(layers, lost)
        require_units(units)
        require_tensors(order, mean_input, units[Fraction(1)], width.bias_compensation)
        repairs = Repairs.stored(named("repair."), document.repair)
        repairs.require_space(ShapeSpace(tuple(layers), tuple(units)), units[Fraction(1)])
        return cls(
            DepthStrategy(layers, depth.objective, metric, depth.search, lost, depth.selector),
            WidthStrategy(units, order, mean_input, width.importance, width.allocation, width.bias_compensation),
            document.fingerprint,
            document.provenance,
            repairs,
        )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no word for what overflowed


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(
            f"{path} does not exist: not an elastic checkpoint, or its selection was interrupted"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is truncated or no JSON ({error}); repeat the selection") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a {FORMAT} file; point at the directory that the selection wrote")
    version = document.get("version")
    if type(version) is not int or version not in (WHOLE_LAYERS_VERSION, SUBLAYERS_VERSION, VERSION):
        raise ArtifactError(
            f"{path} has format version {version}, this amoeba_plugin reads up to {VERSION}; "
            "install the version that wrote it, or repeat the selection"
        )
    return document


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; it belongs beside {JSON_NAME}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError(f"{path} is truncated or of another strategy: its digest is not the one in {JSON_NAME}")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is no safetensors file ({error})") from error
