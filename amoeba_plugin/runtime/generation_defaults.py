"""Defaults of generation that come with a model, saved as they were loaded."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel


class GivenGenerationConfig(GenerationConfig):
    """Is saved with fields that mean nothing to its way of decoding: transformers loads them, but refuses to save them.

    Published models have such fields, a ``temperature`` without ``do_sample`` for one, and whoever turns sampling on
    means them.
    """

    def validate(self, strict: bool = False, **options: Any) -> None:  # type: ignore[override]  # options are the host's matter
        """Refuse what cannot be meant; of what has no effect, only log it."""
        super().validate(strict=False, **options)


def keep_generation_defaults(model: PreTrainedModel) -> None:
    """See to it that a model can be saved with the defaults of generation that it has."""
    if type(getattr(model, "generation_config", None)) is GenerationConfig:
        model.generation_config.__class__ = GivenGenerationConfig
