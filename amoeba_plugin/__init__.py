"""AmoebaLLM for PEFT and llm-compressor: fine-tune once, derive subnets of any shape.

Importing this registers SMOL with PEFT and the modifiers with llm-compressor.
"""

from amoeba_plugin import modifiers as _modifiers  # noqa: F401  # registers the modifiers with llm-compressor
from amoeba_plugin._version import __version__
from amoeba_plugin.checkpoint import extract_checkpoint, load_elastic, save_elastic
from amoeba_plugin.elastic import ElasticModel
from amoeba_plugin.errors import AmoebaError
from amoeba_plugin.extraction import extract
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.smol import SmolConfig, SmolModel
from amoeba_plugin.strategy import DepthStrategy, SubnetStrategy, WidthStrategy

__all__ = [
    "AmoebaError",
    "DepthStrategy",
    "ElasticModel",
    "ShapeSpace",
    "SmolConfig",
    "SmolModel",
    "SubnetShape",
    "SubnetStrategy",
    "WidthStrategy",
    "__version__",
    "extract",
    "extract_checkpoint",
    "load_elastic",
    "save_elastic",
]
