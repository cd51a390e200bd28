"""What llm-compressor's save gets wrong for a model that changed its structure, put right in one place; and its card.

1. ``config.json`` is exchanged for that of the whole model; see ``runtime.compat.own_config_saved``.
2. ``recipe.yaml`` is dumped with Python object tags for enumerations (``actorder`` of GPTQ), which no parser of recipes
   accepts. It is written again with their plain values.
3. In it, all modifiers stand in one stage, the recipe's last. Those of this package get their own stages back, by the
   names that the shipped recipes give them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from amoeba_plugin.extraction.model_card import RECIPE_NAME, write_model_card
from amoeba_plugin.runtime.compat import own_config_saved
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.ranks import rank

STAGES = {
    "DepthShrinkingModifier": "select_stage",
    "WidthShrinkingModifier": "select_stage",
    "OneForAllDistillationModifier": "finetune_stage",
    "SubnetExtractionModifier": "extract_stage",
    "LayerwisePolicyModifier": "policy_stage",
    "AdaptiveLayerTuningModifier": "tune_stage",
}
SAVED_IN: ContextVar[torch.dtype | None] = ContextVar("SAVED_IN", default=None)  # None: as it is computed in


@contextmanager
def saved_in(dtype: torch.dtype) -> Iterator[None]:
    """Let parity, in a block, be that of subnets whose weights will be stored in a dtype."""
    token = SAVED_IN.set(dtype)
    try:
        yield
    finally:
        SAVED_IN.reset(token)


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
    """Write a recipe file that the host saved again, without Python object tags and in stages; one that has neither
    fault, and one that is not there, is left alone."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text:
        return
    saved = yaml.load(text, Loader=_PlainLoader) or {}  # a SafeLoader: it makes no objects
    staged = in_stages(saved)
    if "!!python/" in text or list(staged) != list(saved):
        write_atomically(path, yaml.safe_dump(staged, sort_keys=False).encode())


def in_stages(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the modifiers of this package in stages of their own, in the same order.

    >>> in_stages({"last_stage": {"a_modifiers": {"WidthShrinkingModifier": {}}, "b_modifiers": {"GPTQModifier": {}}}})
    {'select_stage': {'a_modifiers': {'WidthShrinkingModifier': {}}},
     'last_stage': {'b_modifiers': {'GPTQModifier': {}}}}
    """
    stages: dict[str, Any] = {}
    for stage, groups in recipe.items():
        for group, modifiers in groups.items():
            for name, fields in modifiers.items():
                stages.setdefault(STAGES.get(name, stage), {}).setdefault(group, {})[name] = fields
    return stages


class _PlainLoader(yaml.SafeLoader):
    """Reads a tagged enumeration or tuple as the plain value inside; imports and calls nothing."""


def _plain_value(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    values = loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else []
    return list(values) if tag == "tuple" else (values[0] if values else None)


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain_value)
