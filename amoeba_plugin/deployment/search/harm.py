"""What a scheme does to a shape: cut out, exported and run in its engine, on what shapes are judged by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from amoeba_plugin.data.batch import IGNORED, Batch
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.evaluators import Judge
from amoeba_plugin.deployment.search.problem import Choice
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.deployment.tokenizers import mended
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.runtime.scratch import scratch_directory


def harm_of(elastic: Path, base: str | None, judge: Judge) -> Callable[[Choice], Quality]:
    """Return a function that measures what a choice's scheme adds to its shape's value.

    Args:
        elastic: The elastic checkpoint.
        base: Where its base model is now, if it moved.
        judge: Of shapes; it asks engines.
    """

    def harm(choice: Choice) -> Quality:
        flow, point = point_named(str(choice.point))
        with scratch_directory() as scratch:
            extract_checkpoint(elastic, choice.shape, scratch / "subnet", base)
            checkpoint, _ = mended(scratch / "subnet", scratch / "mended")
            exported = scratch / "export"
            exported.mkdir()
            export = flow.export(checkpoint, point.scheme, exported)
            with EngineProcess(flow.name, flow.command()) as engine:
                path, options = str(exported / export.entry), flow.options(point.scheme)
                loaded = 0  # tokens that there is room for

                def nats(batch: Batch) -> list[float]:
                    nonlocal loaded
                    longest = batch["input_ids"].shape[1]
                    if longest > loaded:
                        engine.ask("load", path=path, threads=1, context=longest + 1, batch=1, **options)
                        loaded = longest
                    return [_row_nats(engine, batch, row) for row in range(len(batch["input_ids"]))]

                return judge.harm(choice.shape, nats)

    return harm


def _row_nats(engine: EngineProcess, batch: Batch, row: int) -> float:
    """Return the nats of a row's labels, each behind the tokens in front of it."""
    kept = batch["attention_mask"][row].bool()
    tokens, labels = batch["input_ids"][row][kept].tolist(), batch["labels"][row][kept]
    behind = torch.nonzero(labels != IGNORED).flatten().tolist()
    behind = [count for count in behind if count > 0]
    if not behind:
        return 0.0
    told = engine.ask("token_log_probabilities", tokens=tokens, behind=behind).value
    return -float(sum(told))
