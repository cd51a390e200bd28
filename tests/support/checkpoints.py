"""Elastic checkpoints, changed as somebody might have written them."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.record import ElasticRecord, read_record, write_record
from amoeba_plugin.testing.random_models import attach_random_smol
from support.models import random_elastic


def save_random(model: PreTrainedModel, directory: Path) -> ElasticModel:
    """Save a model in ``base``, and it made elastic with a random strategy and adapter in ``elastic``."""
    model.save_pretrained(directory / "base")
    elastic = random_elastic(model)
    save_elastic(elastic, attach_random_smol(elastic), directory / "elastic", str(directory / "base"))
    return elastic


def record_anew(directory: Path) -> None:
    """Have ``elastic.json`` name the files that are there now."""
    record = ElasticRecord.model_validate_json((directory / "elastic.json").read_bytes())
    write_record(directory, directory, record.base_model, record.dtype, record.space, record.trained_base)
    read_record(directory)
