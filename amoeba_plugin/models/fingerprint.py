"""What identifies a model: digests of its weights and sizes, whatever dtype it is loaded in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.packed_linear import is_packed
from amoeba_plugin.runtime.module_calls import onloaded

FINGERPRINT_ELEMENTS = 256
PACKED = "packed"
Loaded = Callable[[nn.Module], AbstractContextManager[object]]


def model_fingerprint(model: PreTrainedModel, adapter: ArchitectureAdapter, loaded: Loaded = nullcontext) -> str:
    """Return two digests, "WEIGHTS.FRAME": of every decoder parameter, and of what a quantization leaves as it is.

    WEIGHTS: shapes and first elements; "packed" for a model with packed linears. FRAME: sizes of the channel groups,
    and the norms. Values are rounded to bf16 first, so that loading a model in another dtype does not change its
    fingerprint. To be taken before channels are reordered; ``loaded`` has a layer's weights in memory for a block of
    code.
    """
    weights, frame = (hashlib.sha256(model.config.model_type.encode()) for _ in range(2))
    for group in adapter.channel_groups(model.config):
        frame.update(f"{group.name}{group.units}x{group.consumer.channels_per_unit}".encode())
    packed = False
    for index, layer in enumerate(adapter.layers(model)):
        with loaded(layer), onloaded(layer.modules()):
            for path, module in layer.named_modules():
                packed |= is_packed(module)
                for name, parameter in module._parameters.items():
                    if parameter is None or is_packed(module):
                        continue
                    told = _told(".".join(filter(None, (str(index), path, name))), parameter)
                    weights.update(told)
                    if parameter.dim() == 1 and not isinstance(module, nn.Linear):
                        frame.update(told)
    return f"{PACKED if packed else weights.hexdigest()}.{frame.hexdigest()}"


def model_identity(model: PreTrainedModel, adapter: ArchitectureAdapter) -> str:
    """Return what tells a model from others of other scores: its weights; if they are packed, also how."""
    weights, _, frame = model_fingerprint(model, adapter).partition(".")
    if weights != PACKED:
        return weights
    method = getattr(model.config, "quantization_config", None)
    stated = method if isinstance(method, dict) or method is None else method.to_dict()
    return f"{json.dumps(stated, default=repr, sort_keys=True)} {frame}"


def _told(name: str, parameter: Tensor) -> bytes:
    head = parameter.detach().flatten()[:FINGERPRINT_ELEMENTS].to("cpu", torch.bfloat16)
    return f"{name}{tuple(parameter.shape)}".encode() + head.view(torch.int16).numpy().tobytes()


def same_model(fingerprint: str, other: str) -> bool:
    """Tell whether two fingerprints are of one model; a quantized one is known by its frame.

    >>> same_model("a.b", "a.b"), same_model("a.b", "c.b"), same_model("packed.b", "c.b"), same_model("packed.b", "c.d")
    (True, False, True, False)
    """
    (weights, _, frame), (other_weights, _, other_frame) = fingerprint.partition("."), other.partition(".")
    return frame == other_frame if PACKED in (weights, other_weights) else weights == other_weights
