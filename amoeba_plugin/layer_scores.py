"""What decoder layers are worth, each on its own: the figures that published depth selectors rank by."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import functional
from transformers import PreTrainedModel

from amoeba_plugin.architecture import ArchitectureAdapter
from amoeba_plugin.calibration import Batch
from amoeba_plugin.errors import DataError
from amoeba_plugin.layer_flow import layer_flow
from amoeba_plugin.objectives import evaluating


def block_influence(model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch]) -> list[float]:
    """Return for each layer 1 - mean cosine over tokens of input and output (ShortGPT, arXiv:2403.03853, eq. 1)."""
    layers = adapter.layers(model)
    similarity, tokens = [0.0] * len(layers), 0
    with evaluating(model):
        for batch in batches:
            present = batch["attention_mask"].bool()
            tokens += int(present.sum())
            for index, (states, output) in enumerate(layer_flow(model, adapter, batch)):
                # BI_i = 1 - E_t[ x_t . y_t / (|x_t| |y_t|) ], in fp32
                cosine = functional.cosine_similarity(states.float(), output.float(), dim=-1)
                similarity[index] += cosine[present.to(cosine.device)].double().sum().item()
    if not tokens:
        raise DataError(
            "no token to measure block influence on: the calibration data is empty or all padding; pass texts"
        )
    return [1 - total / tokens for total in similarity]
