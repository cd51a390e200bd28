"""A base model whose weights stay in its safetensors files: a part of it is in memory only while it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from amoeba_plugin.runtime.stored_tensors import CheckpointTensors, NativeTensors

logger = logging.getLogger(__name__)


class StreamedWeights:
    """Gives the parameters of a model without weights their tensors for a block of code, and takes them away again."""

    def __init__(self, model: PreTrainedModel, tensors: NativeTensors) -> None:
        self._tensors, self._dtype = tensors, model.dtype
        shared: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        self._keys: dict[nn.Module, dict[str, str]] = {}  # module -> parameter's name in it -> key in the checkpoint
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                key = next((each for each in shared[id(parameter)] if each in tensors), f"{path}.{name}")
                self._keys.setdefault(module, {})[name] = key
        self._held: set[nn.Module] = set()

    def misfit(self) -> str | None:
        """Return a parameter that the checkpoint does not hold in its shape, or ``None`` where all are there."""
        shapes = self._tensors.shapes()
        return next(
            (
                key
                for module, names in self._keys.items()
                for name, key in names.items()
                if shapes.get(key) != tuple(module._parameters[name].shape)  # type: ignore[union-attr]
            ),
            None,
        )

    @contextmanager
    def loaded(self, part: nn.Module) -> Iterator[bool]:
        """Have the weights of a part of the model at hand; yields False where an outer block has them already.

        Args:
            part: A module of the model, with everything below it.
        """
        modules = [module for module in part.modules() if module in self._keys and module not in self._held]
        tensors = self._tensors.read((key for module in modules for key in self._keys[module].values()), self._dtype)
        empty = {module: dict(module._parameters) for module in modules}
        for module in modules:
            for name, key in self._keys[module].items():
                module._parameters[name] = nn.Parameter(tensors[key], requires_grad=False)
        del tensors
        self._held.update(modules)
        try:
            yield bool(modules)
        finally:
            self._held.difference_update(modules)
            for module, parameters in empty.items():
                module._parameters.update(parameters)


def streamed_model(reference: str, dtype: str) -> tuple[PreTrainedModel, StreamedWeights] | None:
    """Return a model whose parameters are placeholders, and what puts the weights in their place.

    Args:
        reference: Path or hub id.
        dtype: To compute in, for example "float32".

    Returns:
        ``None`` where the checkpoint has no safetensors files, or lacks a parameter even after transformers' own
        renaming and merging of tensors: such a model must be loaded as a whole, and the log says so. Quantized ones
        must, too.

    Raises:
        OSError: If there is no such model.
    """
    config = AutoConfig.from_pretrained(reference)
    if getattr(config, "quantization_config", None) is not None:  # 8-bit tensors can have the names and sizes of others
        return None
    tensors = CheckpointTensors.find(reference)
    if tensors is None:
        _tell_whole(reference, "it has no safetensors files")
        return None
    with init_empty_weights(include_buffers=False), no_init_weights():  # buffers (rotary frequencies) are in no file
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    _put_placeholders(model)
    weights = StreamedWeights(model, NativeTensors.of(model, tensors))
    misfit = weights.misfit()
    if misfit is not None:
        _tell_whole(reference, f"its files hold no {misfit} of the model's shape")
        return None
    with suppress(OSError):  # without such a file the one made from the configuration stays
        model.generation_config = GenerationConfig.from_pretrained(reference)
    return model.eval(), weights


def _tell_whole(reference: str, reason: str) -> None:
    logger.warning(
        "the base model %s is loaded as a whole, with memory for all of it, not layer by layer: %s; saving it with "
        "transformers' save_pretrained once helps",
        reference,
        reason,
    )


def _put_placeholders(model: PreTrainedModel) -> None:
    """Give every parameter its size without its memory: one NaN, so that whatever computes with it shows.

    They are on a real device, unlike meta tensors, so that an adapter put on them is real.
    """
    placeholders: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nan = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
            placeholder = placeholders.setdefault(id(parameter), nn.Parameter(nan, requires_grad=False))
            module._parameters[name] = placeholder


def load_on_use(
    model: nn.Module, layers: Sequence[nn.Module], loaded: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    """Load every layer, and every module outside the layers, when it is called, and drop it afterwards.

    Args:
        model: Has the layers; its weights are elsewhere.
        layers: Each is loaded as a whole.
        loaded: Has the weights of a part of the model in memory for a block of code.
    """
    inside = {module for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if module._parameters and module not in inside]
    for part in (*layers, *outside):
        blocks: list[AbstractContextManager[None]] = []

        def enter(part: nn.Module, *_: object, blocks: list[AbstractContextManager[None]] = blocks) -> None:
            blocks.append(loaded(part))
            blocks[-1].__enter__()

        def leave(*_: object, blocks: list[AbstractContextManager[None]] = blocks) -> None:
            blocks.pop().__exit__(None, None, None)

        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave, always_call=True)
