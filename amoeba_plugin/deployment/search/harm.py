"""What a scheme does to a shape: cut out, exported and run in its engine, on what shapes are judged by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from amoeba_plugin.data.batch import IGNORED, Batch
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.flow import DeploymentFlow
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.evaluators import Judge
from amoeba_plugin.deployment.search.problem import Choice
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.deployment.tokenizers import mended
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.extraction.parity import with_parameters_in
from amoeba_plugin.runtime.dtypes import saved_dtype, stored_dtype
from amoeba_plugin.runtime.model_files import copy_tokenizer
from amoeba_plugin.runtime.scratch import scratch_directory
from amoeba_plugin.shape import SubnetShape


def harm_of(live: ElasticModel, judge: Judge) -> Callable[[Choice], Quality]:
    """Return a function that measures what a choice's scheme adds to its shape's value.

    Args:
        live: The elastic model.
        judge: Of its shapes; it asks engines.
    """

    def harm(choice: Choice) -> Quality:
        flow, point = point_named(str(choice.point))
        flow.command()  # refuses where the engine is missing
        with scratch_directory() as scratch:
            checkpoint, exported = _saved(live, choice.shape, scratch), scratch / "export"
            exported.mkdir()
            export = flow.export(checkpoint, point.scheme, exported)
            with EngineProcess(flow.name, flow.command()) as engine:
                return judge.harm(choice.shape, _Nats(engine, flow, point.scheme, exported / export.entry))

    return harm


def _saved(live: ElasticModel, shape: SubnetShape, scratch: Path) -> Path:
    """Save a shape as a checkpoint, in the dtype that extraction saves it in, and with a tokenizer for engines."""
    base, directory = str(live.config.name_or_path), scratch / "subnet"
    if not base:
        raise DeploymentError(
            "the model was loaded from nowhere, so that its tokenizer is unknown, which an export needs; load it by "
            "from_pretrained, or set finalists to 0, and shapes are judged without what a scheme does to them"
        )
    dtype = saved_dtype(live.model.dtype, stored_dtype(base))
    with_parameters_in(extract(live, shape), dtype).save_pretrained(directory)
    copy_tokenizer(base, directory)
    return mended(directory, scratch / "mended")[0]


class _Nats:
    """Asks an engine for the nats of every row's labels; it is loaded anew for longer rows."""

    def __init__(self, engine: EngineProcess, flow: DeploymentFlow, scheme: str, path: Path) -> None:
        self._engine, self._path, self._options, self._room = engine, str(path), flow.options(scheme), 0

    def __call__(self, batch: Batch) -> list[float]:
        longest = batch["input_ids"].shape[1]
        if longest > self._room:
            self._engine.ask("load", path=self._path, threads=1, context=longest + 1, batch=1, **self._options)
            self._room = longest
        return [self._of_row(batch, row) for row in range(len(batch["input_ids"]))]

    def _of_row(self, batch: Batch, row: int) -> float:
        kept = batch["attention_mask"][row].bool()
        tokens, labels = batch["input_ids"][row][kept].tolist(), batch["labels"][row][kept]
        behind = [count for count in torch.nonzero(labels != IGNORED).flatten().tolist() if count > 0]
        if not behind:
            return 0.0
        return -float(sum(self._engine.ask("token_log_probabilities", tokens=tokens, behind=behind).value))
