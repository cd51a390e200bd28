"""SMOL: a shape-aware mixture of LoRAs, as a PEFT method.

In: any causal LM and a ``SmolConfig``. Out: a ``PeftModel`` whose experts the active shape weights, or one shape of it
as an ordinary LoRA. Importing this package registers it, so that ``get_peft_model``, ``PeftModel.from_pretrained`` and
transformers' ``add_adapter`` know ``SmolConfig``.
"""

from amoeba_plugin.smol.config import SmolConfig
from amoeba_plugin.smol.host import register
from amoeba_plugin.smol.layer import SmolLinear
from amoeba_plugin.smol.model import SmolModel
from amoeba_plugin.smol.router import ShapeRouter

__all__ = ["ShapeRouter", "SmolConfig", "SmolLinear", "SmolModel", "register_with_peft"]


def register_with_peft() -> None:
    """Make PEFT know SMOL; calling it again changes nothing.

    Raises:
        PluginError: If another package registered the name "smol" first.
    """
    register("smol", SmolConfig, SmolModel)


register_with_peft()
