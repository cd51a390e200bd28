"""AmoebaLLM for PEFT and llm-compressor: fine-tune once, derive subnets of any shape.

Importing this makes SMOL known to PEFT and the modifiers to llm-compressor; what is heavy is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from amoeba_plugin._version import __version__
from amoeba_plugin.errors import AmoebaError
from amoeba_plugin.plugins.host_registration import register_with_hosts
from amoeba_plugin.shape import ShapeSpace, SubnetShape

if TYPE_CHECKING:
    from amoeba_plugin.deployment.deploy import deploy_shape
    from amoeba_plugin.deployment.flow import DeploymentFlow
    from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
    from amoeba_plugin.elastic.model import ElasticModel
    from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
    from amoeba_plugin.extraction.checkpoint import extract_checkpoint
    from amoeba_plugin.extraction.cut import extract
    from amoeba_plugin.models.adapter import ArchitectureAdapter
    from amoeba_plugin.plugins.hooks import hookimpl
    from amoeba_plugin.selection.depth.task import DepthSelector
    from amoeba_plugin.selection.importance import GroupImportance, Importance
    from amoeba_plugin.selection.objectives import Objective
    from amoeba_plugin.smol import SmolConfig, SmolModel
    from amoeba_plugin.training.one_for_all.options import OneForAllOptions
    from amoeba_plugin.training.one_for_all.train import train_one_for_all
    from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer

_LAZY = {
    "ArchitectureAdapter": "models.adapter",
    "DeploymentFlow": "deployment.flow",
    "DepthSelector": "selection.depth.task",
    "DepthStrategy": "elastic.strategy",
    "ElasticModel": "elastic.model",
    "GroupImportance": "selection.importance",
    "Importance": "selection.importance",
    "Objective": "selection.objectives",
    "OneForAllOptions": "training.one_for_all.options",
    "OneForAllTrainer": "training.one_for_all.trainer",
    "SmolConfig": "smol",
    "SmolModel": "smol",
    "SubnetStrategy": "elastic.strategy",
    "WidthStrategy": "elastic.strategy",
    "attach_smol": "elastic.checkpoint",
    "deploy_shape": "deployment.deploy",
    "extract": "extraction.cut",
    "extract_checkpoint": "extraction.checkpoint",
    "hookimpl": "plugins.hooks",
    "load_elastic": "elastic.checkpoint",
    "save_elastic": "elastic.checkpoint",
    "train_one_for_all": "training.one_for_all.train",
}

__all__ = [
    "AmoebaError",
    "ArchitectureAdapter",
    "DeploymentFlow",
    "DepthSelector",
    "DepthStrategy",
    "ElasticModel",
    "GroupImportance",
    "Importance",
    "Objective",
    "OneForAllOptions",
    "OneForAllTrainer",
    "ShapeSpace",
    "SmolConfig",
    "SmolModel",
    "SubnetShape",
    "SubnetStrategy",
    "WidthStrategy",
    "__version__",
    "attach_smol",
    "deploy_shape",
    "extract",
    "extract_checkpoint",
    "hookimpl",
    "load_elastic",
    "save_elastic",
    "train_one_for_all",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_with_hosts()
