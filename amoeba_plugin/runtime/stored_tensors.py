"""Tensors in safetensors files, by the names of the files and by those of the model that transformers makes of them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from amoeba_plugin.errors import ArtifactError


def read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor, by the names that an index gives them.

    Raises:
        ArtifactError: If it is truncated, or no index.
    """
    try:
        names: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        return {key: str(file) for key, file in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path} is truncated or no index of weights ({error}); copy it anew") from error


class CheckpointTensors:
    """The tensors of a safetensors checkpoint, sharded or not; files are open only while something is read."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    @classmethod
    def find(cls, reference: str) -> CheckpointTensors | None:
        """Return the tensors of a model by its path or hub id, ``None`` where it has no safetensors files."""
        single = cached_file(reference, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is not None:  # transformers takes it, whatever an index beside it says
            with safe_open(single, framework="pt") as file:
                names = file.keys()
            return cls(dict.fromkeys(names, Path(single)))
        index = cached_file(reference, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is None:
            return None
        paths, _ = get_checkpoint_shard_files(reference, index)
        by_name = {Path(path).name: Path(path) for path in paths}
        return cls({key: by_name[file] for key, file in read_index(Path(index)).items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor; none is read."""
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._files.values())):
            with safe_open(path, framework="pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return found

    def read(self, keys: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return tensors in a dtype: views of the files where they have it, of which only what is looked at is read.

        Nobody else sees what is written into such a view: the file is mapped anew at every call, for this process.
        """
        found: dict[str, Tensor] = {}
        wanted = sorted(set(keys), key=lambda key: (self._files[key], key))
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for key in wanted:
                path = self._files[key]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                found[key] = opened[path].get_tensor(key).to(dtype)
        return found


@dataclass(frozen=True)
class _Source:
    """Where a parameter is in a checkpoint: under one key, or under several that transformers makes one of."""

    keys: tuple[str, ...]
    patterns: tuple[str, ...] = ()  # of the converter, one for each key
    converter: WeightConverter | None = None

    def merged(self, name: str, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter, given the tensors of the checkpoint."""
        if self.converter is None:
            return tensors[self.keys[0]]
        converter: Any = copy.deepcopy(self.converter)  # it collects what it is given
        for key, pattern in zip(self.keys, self.patterns, strict=True):
            converter.add_tensor(name, key, pattern, tensors[key])
        found = converter.convert(name, model=model, config=model.config)[name]
        merged: Tensor = found[0] if isinstance(found, list) else found
        return merged


class NativeTensors:
    """The tensors of a checkpoint under the names that a model's parameters have, merged as transformers merges them.

    Older checkpoints name parts otherwise, and those of mixtures of experts hold every expert by itself.
    """

    def __init__(self, model: PreTrainedModel, tensors: CheckpointTensors, sources: Mapping[str, _Source]) -> None:
        self._model, self._tensors, self._sources = model, tensors, dict(sources)

    @classmethod
    def of(cls, model: PreTrainedModel, tensors: CheckpointTensors) -> NativeTensors:
        """Translate the names of a checkpoint's tensors for a model."""
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        sources: dict[str, _Source] = {}
        for key in sorted(tensors, key=_natural):  # experts are merged in the order of their numbers
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
            if pattern is None:
                sources[name] = _Source((key,))
                continue
            converter = next(each for each in converters if pattern in each.source_patterns)
            before = sources.get(name, _Source(()))
            sources[name] = _Source((*before.keys, key), (*before.patterns, pattern), converter)
        return cls(model, tensors, sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter; nothing is read."""
        stored = {key: torch.empty(shape, device="meta") for key, shape in self._tensors.shapes().items()}
        return {name: tuple(each.merged(name, self._model, stored).shape) for name, each in self._sources.items()}

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return parameters in a dtype; see :meth:`CheckpointTensors.read`."""
        wanted = {name: self._sources[name] for name in names}
        stored = self._tensors.read((key for each in wanted.values() for key in each.keys), dtype)
        found = {}
        for name, each in wanted.items():
            found[name] = each.merged(name, self._model, stored)
            for key in each.keys:
                del stored[key]  # what was merged is not needed twice
        return found


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", key)]
