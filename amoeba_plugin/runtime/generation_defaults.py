"""Defaults of generation that come with a model, saved as they were loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from amoeba_plugin.errors import ArtifactError

logger = logging.getLogger(__name__)


class GivenGenerationConfig(GenerationConfig):
    """Is saved with fields that mean nothing to its way of decoding: transformers loads them, but refuses to save them.

    Published models have such fields, a ``temperature`` without ``do_sample`` for one, and whoever turns sampling on
    means them.
    """

    def validate(self, strict: bool = False, **options: Any) -> None:  # type: ignore[override]  # options are the host's matter
        """Refuse what cannot be meant; of what has no effect, only log it."""
        super().validate(strict=False, **options)


def require_generation_defaults(model: str) -> None:
    """Look at a model's file of defaults: log that it is no JSON, of which transformers says nothing.

    Args:
        model: Path or hub id; on the hub nothing is looked at.

    Raises:
        ArtifactError: If the model cannot be loaded with it.
    """
    path = Path(model) / GENERATION_CONFIG_NAME
    if not path.is_file():
        return
    try:
        GenerationConfig.from_pretrained(model)
    except OSError:
        logger.warning(
            "%s is no JSON and is passed over: generation goes by the defaults of transformers and config.json",
            path,
        )
    except Exception as error:  # of what is no mapping, or has other kinds of values, it raises anything
        raise ArtifactError(f"{path} is damaged ({error}); put the file back that came with the model") from error


def keep_generation_defaults(model: PreTrainedModel) -> None:
    """See to it that a model can be saved with the defaults of generation that it has."""
    if type(getattr(model, "generation_config", None)) is GenerationConfig:
        model.generation_config.__class__ = GivenGenerationConfig
