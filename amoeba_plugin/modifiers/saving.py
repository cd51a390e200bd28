"""What llm-compressor's save gets wrong for a model that changed its structure, put right in one place; and its card.

1. ``config.json`` is exchanged for that of the whole model; see ``runtime.compat.own_config_saved``.
2. ``recipe.yaml`` is dumped with Python object tags for enumerations (``actorder`` of GPTQ), which no parser of recipes
   accepts. It is written again with their plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from amoeba_plugin.extraction.model_card import RECIPE_NAME, write_model_card
from amoeba_plugin.runtime.compat import own_config_saved
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.ranks import rank


def save_as_it_is(model: PreTrainedModel, facts: Mapping[str, str]) -> None:
    """Make ``model.save_pretrained``, which the host has wrapped, write the model's own configuration, a plain recipe,
    and a model card.

    Args:
        model: A subnet.
        facts: For the card, from :func:`amoeba_plugin.extraction.model_card.model_card`.
    """
    save: Callable[..., Any] = model.save_pretrained

    def save_pretrained(save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        with own_config_saved(model.config):
            result = save(save_directory, *args, **kwargs)
        plain_recipe(Path(save_directory) / RECIPE_NAME)
        if rank() == 0:
            write_model_card(Path(save_directory), facts)
        return result

    save_pretrained._overridden = True  # type: ignore[attr-defined]  # the host's mark: do not wrap again
    vars(model)["save_pretrained"] = save_pretrained


def plain_recipe(path: Path) -> None:
    """Write a recipe file again without Python object tags; one that has none is left alone."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "!!python/" in text:
        plain = yaml.load(text, Loader=_PlainLoader)  # a SafeLoader: it makes no objects
        write_atomically(path, yaml.safe_dump(plain, sort_keys=False).encode())


class _PlainLoader(yaml.SafeLoader):
    """Reads a tagged enumeration or tuple as the plain value inside; imports and calls nothing."""


def _plain_value(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    values = loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else []
    return list(values) if tag == "tuple" else (values[0] if values else None)


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain_value)
