"""What the demo measures of a model: quality on held-out text, size on disk, distance of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.demo.data import DemoData
from amoeba_plugin.deployment.latency import Latency
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.reports.report import Quality, QuantizedRow, ShapeRow
from amoeba_plugin.runtime.scratch import scratch_directory
from amoeba_plugin.selection.registry import objective_named

DENSE = "dense"


@dataclass(frozen=True)
class Figures:
    """What was measured of the dense model, by the name ``dense``, and of every subnet, by its shape.

    Attributes:
        models: Ordinary models, as they were extracted.
        checkpoint_bytes: Of their files of weights.
        before: Quality after selection alone; of the dense model, its quality.
        after: Quality after training; not of the dense model.
        latency: Measured side by side.
    """

    models: Mapping[str, PreTrainedModel]
    checkpoint_bytes: Mapping[str, int]
    before: Mapping[str, Quality]
    after: Mapping[str, Quality]
    latency: Mapping[str, Latency]

    def row(self, name: str) -> ShapeRow:
        """Return the line of a report for the dense model or a shape."""
        model, dense = self.models[name], self.models[DENSE]
        return ShapeRow(
            shape=f"{dense.config.num_hidden_layers}x1" if name == DENSE else name,
            parameters=model.num_parameters(),
            block_share=_block_parameters(model) / _block_parameters(dense),
            checkpoint_bytes=self.checkpoint_bytes[name],
            before=self.before[name],
            after=self.after.get(name),
            prefill_ms=self.latency[name].prefill_ms,
            decode_ms=self.latency[name].decode_ms,
        )

    def quantized_row(self, directory: Path, shape: str, data: DemoData) -> QuantizedRow:
        """Return the line of a quantized checkpoint beside the subnet that it was made of."""
        quantized = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        return QuantizedRow(
            shape=shape,
            scheme="GPTQ, 4-bit weights in groups of 32",
            checkpoint_bytes=weight_bytes(directory),
            quality=quality(quantized, data),
            unquantized_bytes=self.checkpoint_bytes[shape],
            unquantized=self.after[shape],
            mean_kl_divergence=mean_kl_divergence(self.models[shape], quantized, data.held_out[:2]),
        )


def quality(model: PreTrainedModel, data: DemoData) -> Quality:
    """Return a model's quality on the held-out text and questions."""
    perplexity = objective_named("perplexity").measure(model, data.held_out)
    accuracy = objective_named("accuracy").measure(model, data.questions)
    return Quality(loss=perplexity.loss, perplexity=perplexity.value, accuracy=accuracy.value)


def quality_by_shape(elastic: ElasticModel, shapes: Sequence[str], data: DemoData) -> dict[str, Quality]:
    """Return the quality of an elastic model at every shape, with the adapter it has on at the moment."""
    found = {}
    for shape in tqdm(shapes, desc="quality before training", unit="shape"):
        with elastic.active(shape) as model:
            found[shape] = quality(model, data)
    return found


@torch.no_grad()
def mean_kl_divergence(model: PreTrainedModel, other: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Return the mean over positions of KL(model || other), nats per token."""
    total, positions = 0.0, 0
    for batch in batches:
        p, q = (each(batch["input_ids"], use_cache=False).logits.log_softmax(-1) for each in (model, other))
        total += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        positions += batch["input_ids"].numel()
    return total / positions


def checkpoint_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights of a model as it would be saved."""
    with scratch_directory() as directory:
        model.save_pretrained(directory)
        return weight_bytes(directory)


def weight_bytes(directory: Path) -> int:
    """Return the bytes of all files of weights in a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _block_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.model.layers.parameters())
