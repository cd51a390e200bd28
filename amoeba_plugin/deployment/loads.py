"""Whether an engine loads a subnet of some shape, asked before anything is selected, trained or cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from amoeba_plugin.deployment.flow import SEPARATOR
from amoeba_plugin.deployment.rules import candidate, require_engine, require_loadable
from amoeba_plugin.elastic.layer_sizes import LOST_SOMEWHERE, LayerSizes
from amoeba_plugin.elastic.record import ELASTIC_NAME, read_record
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.elastic.subnet_config import config_for, why_not_cut_again
from amoeba_plugin.elastic.subnet_plan import SubnetPlan
from amoeba_plugin.errors import RecipeError, ShapeError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.runtime.model_files import load_config
from amoeba_plugin.selection.width.allocation import kept_units
from amoeba_plugin.shape import SubnetShape


@dataclass(frozen=True)
class Loading:
    """An engine's answer that it loads a subnet.

    Attributes:
        saved_as: Class of the subnet's checkpoint.
        read: Versions of the engine whose rules were asked.
        warnings: What is not as one would think, each with its source.
    """

    saved_as: str
    read: str
    warnings: tuple[str, ...]


def require_loads(
    shape: str,
    model: str,
    flow: str,
    *,
    strategy: Path | None = None,
    portable: bool = False,
    round_to: int = 1,
    devices: int = 1,
) -> Loading:
    """Return what an engine says of a subnet that it can load; no weights are loaded.

    Args:
        shape: DEPTHxWIDTH.
        model: Path or hub id of the whole model.
        flow: An engine (torch, vllm, llama-cpp, onnxruntime, openvino), or an engine at a scheme (``vllm:W4A16``).
        strategy: Elastic checkpoint, or directory with ``strategy.json``, which knows the sizes of every layer; without
            it every layer is taken to keep the same share.
        portable: As extracted with ``portable``: layers that differ are padded to a stock class.
        round_to: Channels that sizes are multiples of, where there is no strategy.
        devices: That the engine splits the subnet over.

    Raises:
        ArchitectureError: If the engine cannot load it, with every reason and its source.
        ArtifactError: If the strategy is of another model.
        RecipeError: If engine or scheme are unknown, or an option would do nothing.
        ShapeError: If model or strategy have no such shape.
    """
    _require_effect(strategy, portable, round_to)
    engine, _, scheme = flow.partition(SEPARATOR)
    require_engine(engine)
    parsed, whole = SubnetShape.parse(shape), load_config(model)
    adapter = architecture_of(whole)
    told = []
    if strategy is None:
        subnet = config_for(adapter, whole, uniform_sizes(adapter, whole, parsed, round_to))
        told = ["every layer is taken to keep the same sizes (allocation: uniform); --strategy DIR goes by those found"]
    else:
        if (strategy / ELASTIC_NAME).exists():  # else it is a strategy alone
            read_record(strategy)
        plan = SubnetPlan(adapter, whole, SubnetStrategy.load(strategy))
        plan.require_fit(str(strategy))
        sizes = plan.sizes(plan.space.require(parsed))
        subnet = plan.configured(sizes.padded if portable else sizes)
    final = why_not_cut_again(subnet)
    if final is not None:
        told.append(f"it cannot be cut again, {final}")
    subject = candidate(subnet, adapter, engine, scheme or None, devices)
    found = require_loadable(subject, engine)
    warnings = [f"{each.where}: {each.rule.says} [{each.rule.source}]" for each in found]
    return Loading(subject.saved_as, require_engine(engine).read, (*told, *warnings))


def _require_effect(strategy: Path | None, portable: bool, round_to: int) -> None:
    if portable and strategy is None:
        raise RecipeError(
            "--portable pads layers that differ, and without --strategy all are taken to be alike; add --strategy DIR, "
            "or leave out --portable"
        )
    if round_to > 1 and strategy is not None:
        raise RecipeError("--round-to is for sizes that are not known yet, and --strategy knows them; leave one out")


def uniform_sizes(
    adapter: ArchitectureAdapter, config: PretrainedConfig, shape: SubnetShape, round_to: int | Mapping[str, int] = 1
) -> LayerSizes:
    """Return the sizes of a shape of a model, allocated uniformly, whatever layers it will keep.

    A whole number of layers is taken for whole layers, a half for layers of which some lack attention or MLP.

    Raises:
        ShapeError: If the model has fewer layers.
        RecipeError: If ``round_to`` does not fit the model, or leaves nothing.
    """
    if shape.depth > config.num_hidden_layers:
        raise ShapeError(f"shape {shape} has more layers than the model, which has {config.num_hidden_layers}")
    units, kept = kept_units(adapter.channel_groups(config), shape.width, round_to), range(math.ceil(shape.depth))
    return LayerSizes(kept, [units] * len(kept), {} if shape.depth == int(shape.depth) else LOST_SOMEWHERE)
