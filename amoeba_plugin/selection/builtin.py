"""The objectives, importances, repairs, depth selectors and sensitivities that come with the package: a line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from amoeba_plugin.plugins.hooks import hookimpl
from amoeba_plugin.selection.depth.search import search_all_ways, search_depths, search_greedily, search_lazily
from amoeba_plugin.selection.depth.selectors import (
    last_layers,
    least_angular_distance,
    least_block_influence,
    least_magnitude,
    least_magnitude_plus,
    least_taylor,
    least_taylor_plus,
    one_shot,
)
from amoeba_plugin.selection.depth.task import DepthSelector, SearchOptions
from amoeba_plugin.selection.importance import (
    AnyImportance,
    GroupImportance,
    Importance,
    MomentImportance,
    column_norm,
    group_magnitude,
    group_taylor,
    group_taylor_vector,
    input_fluctuation,
    weighted_input_fluctuation,
    weighted_input_norm,
)
from amoeba_plugin.selection.layerwise.sensitivities import final_divergence, fisher, output_error
from amoeba_plugin.selection.layerwise.task import Sensitivity
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, Objective, Perplexity, PerTokenLoss
from amoeba_plugin.selection.repair.elimination import elimination_errors
from amoeba_plugin.selection.repair.width import Repair, by_least_squares

SEARCH_OPTIONS = tuple(field.name for field in fields(SearchOptions))
WITHOUT_BEAM = tuple(name for name in SEARCH_OPTIONS if name != "beam")

OBJECTIVES: tuple[Objective, ...] = (PerTokenLoss(), Perplexity(), MultipleChoiceAccuracy())

# fmt: off
IMPORTANCES: tuple[AnyImportance, ...] = (
    MomentImportance("obs", elimination_errors, "error left when a unit goes and the rest is repaired (OBS, SlimGPT)"),
    Importance("flap", weighted_input_fluctuation, True, description="input variance x weight norm^2 (WIFV)"),
    Importance("flap_ifv", input_fluctuation, True, description="input variance (IFV)"),
    Importance("flap_wifn", weighted_input_norm, True, description="mean |weight| x input norm (WIFN)"),
    Importance("wanda", weighted_input_norm, description="mean |weight| x input norm, heads not squared (Wanda-sp)"),
    Importance("magnitude", column_norm, needs_statistics=False, description="weight norm of the consumer's column"),
    GroupImportance("group_magnitude", group_magnitude, description="squared norm of all weights of a unit"),
    GroupImportance("taylor", group_taylor, True, "sum of |gradient x weight| (ELMS, LLM-Pruner)"),
    GroupImportance("taylor_vector", group_taylor_vector, True,
                    "|sum of gradient x weight| per row and column (LLM-Pruner)"),
)

REPAIRS: tuple[Repair, ...] = (
    Repair(
        "least_squares", by_least_squares,
        "removed channels predicted from those kept, as weights (OBS, SlimGPT); MLPs make up for what was lost so far",
        catches_up=0.5,
    ),
    Repair("local_least_squares", by_least_squares, "the same, and every linear for itself"),
)

SENSITIVITIES: tuple[Sensitivity, ...] = (
    Sensitivity("kl", final_divergence, "nats per token", "KL of the model with one unit compressed, from the dense"),
    Sensitivity("output_error", output_error, "share", "error of the layer's output, of what the layer adds"),
    Sensitivity("fisher", fisher, "nats per token", "change of weights squared x gradients squared"),
)

DEPTH_SELECTORS: tuple[DepthSelector, ...] = (
    DepthSelector("dynamic_program", search_depths, SEARCH_OPTIONS, "the paper's search", folds=True),
    DepthSelector("greedy", search_greedily, WITHOUT_BEAM,
                  "the layer goes without which the rest is best, again and again (SLEB)", folds=True),
    DepthSelector("lazy_greedy", search_lazily, WITHOUT_BEAM,
                  "greedy; a layer that was dear before is not measured again (Minoux)", folds=True),
    DepthSelector("auto", search_all_ways, SEARCH_OPTIONS, "the best of program, greedy and published selectors",
                  folds=True),
    DepthSelector("block_influence", least_block_influence, (), "1 - cosine of input and output (ShortGPT)"),
    DepthSelector("one_shot", one_shot, (), "the objective without each layer alone (Shortened LLaMA)"),
    DepthSelector("taylor", least_taylor, (), "sum of |gradient x weight| (Shortened LLaMA)"),
    DepthSelector("taylor_plus", least_taylor_plus, (), "taylor, first 4 and last 2 layers kept"),
    DepthSelector("magnitude", least_magnitude, (), "sum of |weight| (Shortened LLaMA)"),
    DepthSelector("magnitude_plus", least_magnitude_plus, (), "magnitude, first 4 and last 2 layers kept"),
    DepthSelector("angular_distance", least_angular_distance, (), "the run that turns states least (Gromov et al.)"),
    DepthSelector("last_layers", last_layers, (), "the deepest layers but the last go"),
)
# fmt: on


@hookimpl
def amoeba_objectives() -> Mapping[str, Objective]:
    """Return the objectives by name."""
    return {objective.name: objective for objective in OBJECTIVES}


@hookimpl
def amoeba_importances() -> Mapping[str, AnyImportance]:
    """Return the importances by name."""
    return {importance.name: importance for importance in IMPORTANCES}


@hookimpl
def amoeba_repairs() -> Mapping[str, Repair]:
    """Return the repairs by name."""
    return {repair.name: repair for repair in REPAIRS}


@hookimpl
def amoeba_depth_selectors() -> Mapping[str, DepthSelector]:
    """Return the depth selectors by name."""
    return {selector.name: selector for selector in DEPTH_SELECTORS}


@hookimpl
def amoeba_sensitivities() -> Mapping[str, Sensitivity]:
    """Return the sensitivities by name."""
    return {sensitivity.name: sensitivity for sensitivity in SENSITIVITIES}
