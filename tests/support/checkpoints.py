"""Elastic checkpoints, changed as somebody might have written them."""

from __future__ import annotations

from pathlib import Path

from amoeba_plugin.elastic.record import ElasticRecord, read_record, write_record


def record_anew(directory: Path) -> None:
    """Have ``elastic.json`` name the files that are there now."""
    record = ElasticRecord.model_validate_json((directory / "elastic.json").read_bytes())
    write_record(directory, directory, record.base_model, record.dtype, record.space, record.trained_base)
    read_record(directory)
