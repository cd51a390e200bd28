"""A base model whose weights stay in its safetensors files: a part of it is in memory only while it is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files


class CheckpointTensors:
    """The tensors of a safetensors checkpoint, sharded or not; files are open only while something is read."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    @classmethod
    def find(cls, reference: str) -> CheckpointTensors | None:
        """Return the tensors of a model by its path or hub id, ``None`` where it has no safetensors files."""
        index = cached_file(reference, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is not None:
            names = json.loads(Path(index).read_bytes())["weight_map"]
            paths, _ = get_checkpoint_shard_files(reference, index)
            by_name = {Path(path).name: Path(path) for path in paths}
            return cls({key: by_name[file] for key, file in names.items()})
        single = cached_file(reference, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is None:
            return None
        with safe_open(single, framework="pt") as file:
            names = file.keys()
        return cls(dict.fromkeys(names, Path(single)))

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor; none is read."""
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._files.values())):
            with safe_open(path, framework="pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return found

    def read(self, keys: Iterable[str], dtype: torch.dtype, copy: bool = True) -> dict[str, Tensor]:
        """Return tensors in a dtype.

        Args:
            keys: Their names.
            dtype: Converted where the file has another one.
            copy: False: views of the files where dtypes agree, of which only what is looked at is read.
        """
        found: dict[str, Tensor] = {}
        wanted = sorted(set(keys), key=lambda key: (self._files[key], key))
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for key in wanted:
                path = self._files[key]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                found[key] = opened[path].get_tensor(key).to(dtype, copy=copy)
        return found


class StreamedWeights:
    """Gives the parameters of a model without weights their tensors for a block of code, and takes them away again."""

    def __init__(self, model: PreTrainedModel, tensors: CheckpointTensors) -> None:
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

    def fit(self) -> bool:
        """Return whether the checkpoint holds every parameter under its own name and in its own shape."""
        shapes = self._tensors.shapes()
        return all(
            shapes.get(key) == tuple(module._parameters[name].shape)  # type: ignore[union-attr]
            for module, names in self._keys.items()
            for name, key in names.items()
        )

    @contextmanager
    def loaded(self, part: nn.Module, copy: bool = True) -> Iterator[bool]:
        """Have the weights of a part of the model in memory; yields False where an outer block has them already.

        Args:
            part: A module of the model, with everything below it.
            copy: False: only to look at; see :meth:`CheckpointTensors.read`.
        """
        modules = [module for module in part.modules() if module in self._keys and module not in self._held]
        tensors = self._tensors.read(
            (key for module in modules for key in self._keys[module].values()), self._dtype, copy
        )
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
        ``None`` where the checkpoint has no safetensors files, or files in another layout than the model's: such a
        model must be loaded as a whole.

    Raises:
        OSError: If there is no such model.
    """
    config = AutoConfig.from_pretrained(reference)
    tensors = CheckpointTensors.find(reference)
    if tensors is None:
        return None
    with init_empty_weights(include_buffers=False):  # buffers (rotary frequencies) are in no checkpoint
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    _put_placeholders(model)
    weights = StreamedWeights(model, tensors)
    if not weights.fit():
        return None
    with suppress(OSError):  # without such a file the one made from the configuration stays
        model.generation_config = GenerationConfig.from_pretrained(reference)
    return model.eval(), weights


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
