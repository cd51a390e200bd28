"""Tuned models on disk: an adapter whose file has the exits' norms, or a model that has them; PEFT's and transformers'
own formats. One exit alone becomes an ordinary checkpoint by extraction.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.errors import ArtifactError, ShapeError
from amoeba_plugin.models.compressed_linear import keep_packed
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.runtime.stored_tensors import CheckpointTensors
from amoeba_plugin.training.layer_tuning.exits import BRANCH_NORMS, EXIT_DEPTHS, STACKED_NORMS, Exits, attach_exits

CONFIG_NAME, BASE_NAME = "adapter_config.json", "base"


def load_tuned(directory: Path, base: str | None = None, **how: Any) -> tuple[PreTrainedModel | PeftModel, Exits]:
    """Load what layer tuning saved, with its exits.

    Args:
        directory: Of an adapter, perhaps with its ``base`` in it, or of a model.
        base: Where an adapter's base model is now, if it moved.
        how: Of the base's ``from_pretrained``: a dtype, a quantization.

    Raises:
        ArtifactError: If the directory holds neither, or is damaged.
    """
    try:
        if (directory / CONFIG_NAME).is_file():
            return _load_adapter(directory, base, how)
        model = AutoModelForCausalLM.from_pretrained(directory, **how).eval()
        depths = getattr(model.config, EXIT_DEPTHS, None) or [model.config.num_hidden_layers]
        exits = attach_exits(model, depths, stacked=True)
        _load_norms(exits, directory)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{directory} holds no tuned model, or is damaged ({error}); copy it anew") from error
    return model, exits


def _load_adapter(directory: Path, base: str | None, how: dict[str, Any]) -> tuple[PeftModel, Exits]:
    config: Any = PeftConfig.from_pretrained(str(directory))
    own = directory / BASE_NAME
    where = base or (own if own.is_dir() else config.base_model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(where, **how)
    keep_packed(model)
    saved = [name.split(".") for name in config.modules_to_save or ()]
    depths = [int(name[1]) for name in saved if name[0] in (STACKED_NORMS, BRANCH_NORMS)]
    stacked = any(name[0] == STACKED_NORMS for name in saved)
    exits = attach_exits(model, [*depths, model.config.num_hidden_layers], stacked)
    return PeftModel.from_pretrained(model, str(directory)).eval(), exits


def _load_norms(exits: Exits, directory: Path) -> None:
    """Read the exits' norms, which transformers does not know of, out of a model's files."""
    wanted = [f"{STACKED_NORMS}.{depth}.{name}" for depth in exits.depths if depth < len(exits.layers)
              for name in exits.norm(depth).state_dict()]  # fmt: skip
    tensors = CheckpointTensors.find(str(directory))
    if tensors is None or not set(wanted) <= set(tensors):
        raise ArtifactError(f"{directory} lacks the norms of its exits; copy it anew")
    found = tensors.read(wanted, exits.model.dtype)
    exits.model.load_state_dict({name: value.clone() for name, value in found.items()}, strict=False)


def fold(model: PreTrainedModel | PeftModel, exits: Exits, depth: int) -> PreTrainedModel:
    """Fold an adapter into a model, as far as an exit computes with it; the norms stay beside it.

    Args:
        model: Changed; perhaps a copy of the one that has the exits.
        exits: Say which layers that is.
        depth: Of the exit.
    """
    if not isinstance(model, PeftModel):
        return model
    inner = model.get_base_model()
    for layer in exits.adapter.layers(inner)[: exits.branch(depth)]:
        for name, module in list(layer.named_modules()):
            if isinstance(module, BaseTunerLayer):
                layer.set_submodule(name, module.get_base_layer())
    folded: PreTrainedModel = model.merge_and_unload()
    return folded


def save_exit(model: PreTrainedModel | PeftModel, exits: Exits, depth: int, directory: Path) -> None:
    """Write an elastic checkpoint whose shapes are one exit, ``DEPTHx1``, and the whole model behind the exit's norm.

    ``amoeba extract`` makes an ordinary checkpoint of the exit, ``amoeba deploy`` takes it to an engine.

    Args:
        model: As it was tuned; an adapter is folded into a copy.
        exits: Of it.
        depth: One of its exits.
        directory: New, empty, or an elastic checkpoint, which is replaced.

    Raises:
        ShapeError: If there is no such exit.
        ArtifactError: If the directory holds something else.
    """
    if depth not in exits.depths:
        raise ShapeError(f"there is no exit at {depth}; there are {', '.join(map(str, exits.depths))}")
    base = str(exits.config.name_or_path)
    inner = fold(copy.deepcopy(model), exits, depth)
    own = attach_exits(inner, exits.depths, exits.stacked)
    norm = own.norm(depth)
    own.remove()
    setattr(own.adapter.decoder(inner), own.adapter.final_norm, norm)
    prefix = DepthStrategy.given({str(depth): list(range(depth))}, len(own.layers))
    strategy = SubnetStrategy(prefix, WidthStrategy.whole(), model_fingerprint(inner, own.adapter))
    save_elastic(ElasticModel(inner.eval(), strategy), None, directory, base, trained_base=True)
