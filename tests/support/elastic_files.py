"""An elastic checkpoint with its base, a tokenizer and text, as deployment finds them on a disk."""

from __future__ import annotations

from pathlib import Path

from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import random_model, random_strategy


def write_elastic(directory: Path) -> ElasticModel:
    """Write ``elastic/``, its ``base/``, and ``text.txt``; return the elastic model of random weights and orders."""
    model = random_model(CONFIG)
    model.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    live = ElasticModel(model, random_strategy(model))
    save_elastic(live, None, directory / "elastic", str(directory / "base"))
    (directory / "text.txt").write_text("\n".join(shipped_texts().passages))
    return live
