"""The demo's search against published ways to choose layers: at the same depths, on the same data, all repaired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.reports.report import DepthRow
from amoeba_plugin.selection.depth.selectors import random_depths
from amoeba_plugin.selection.depth.task import DepthTask
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import depth_selector_named, objective_named
from amoeba_plugin.selection.repair.depth import fold_depths
from amoeba_plugin.selection.repair.width import repair_shapes

PUBLISHED = {
    "block_influence": "Block Influence",
    "taylor_plus": "Taylor+",
    "magnitude_plus": "Magnitude+",
    "angular_distance": "angular distance",
    "last_layers": "last layers",
}


def compare_depth_selectors(
    model: PreTrainedModel,
    searched: DepthStrategy,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    depths: Sequence[int],
    random_selections: int,
    seed: int,
) -> list[DepthRow]:
    """Measure the layers that every selector keeps, at the same depths, repaired, before any training.

    Args:
        model: The dense model; left as it was.
        searched: What the dynamic program found on ``calibration``.
        calibration: The data that selectors see, and repairs too; gives ``DepthRow.objective``.
        held_out: Data that no selector saw; gives ``DepthRow.held_out_loss``.
        depths: Depths to compare at.
        random_selections: How many random choices to measure at each depth.
        seed: Of the random ones.
    """
    adapter = architecture_for(model.config.model_type)
    layers = len(adapter.layers(model))
    task = DepthTask(model, adapter, objective_named("loss"), calibration, min_depth=min(depths), progress=False)
    strategies: dict[str, DepthStrategy] = {
        "dynamic program + exchanges": searched,  # as the demo's recipe asks for it
        **{label: depth_selector_named(name).select(task) for name, label in PUBLISHED.items()},
        **{f"random {draw + 1}": random_depths(layers, depths, seed + draw) for draw in range(random_selections)},
    }
    measured: dict[tuple[int, ...], dict[str, float]] = {}  # selectors agree now and then
    rows = []
    for depth, (name, strategy) in tqdm(
        [(d, item) for d in depths for item in strategies.items()], desc="depth selectors"
    ):
        kept = strategy.kept[depth]
        if kept not in measured:
            measured[kept] = _losses(model, kept, {"calibration": calibration, "held out": held_out})
        loss = measured[kept]
        rows.append(
            DepthRow(
                selector=name,
                depth=depth,
                kept_layers=list(kept),
                objective=loss["calibration"],
                held_out_loss=loss["held out"],
            )
        )
    return rows


def _losses(model: PreTrainedModel, kept: tuple[int, ...], data: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    adapter = architecture_for(model.config.model_type)
    whole, width = tuple(range(len(adapter.layers(model)))), WidthStrategy.whole()
    depth = DepthStrategy({len(whole): whole, len(kept): kept})
    runs = LayerRuns.of(model, adapter, data["calibration"])
    repairs = repair_shapes(runs, width, None, fold_depths(runs, depth, progress=False))
    fingerprint = model_fingerprint(model, adapter)
    elastic = ElasticModel(model, SubnetStrategy(depth, width, fingerprint, repairs=repairs))
    try:
        with elastic.active(f"{len(kept)}x1"):
            return {name: objective_named("loss").measure(model, batches).value for name, batches in data.items()}
    finally:
        elastic.release()
