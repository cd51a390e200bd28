"""How far a subnet is from the elastic model that it was cut from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.record import ADAPTER_DIRECTORY
from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE
from amoeba_plugin.runtime.dtypes import named
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.shape import SubnetShape

PARITY_NAME = "parity.json"  # in the checkpoint
PARITY_TOKENS = 64
AdapterMode = Literal["fold", "separate"]


@dataclass(frozen=True)
class Parity:
    """How far a subnet is from the elastic model at its shape, on one batch of random tokens."""

    shape: str
    adapter: AdapterMode  # "separate": the checkpoint was loaded with the LoRA beside it, by stock PEFT
    tokens: int
    max_logit_difference: float
    mean_kl_divergence: float  # nats per token
    dtype: str = ""  # that the subnet is saved in
    elastic_dtype: str = ""  # that the elastic model was computed in

    @property
    def in_words(self) -> str:
        """The differences as a sentence, as logs and model cards print it."""
        difference = f"{self.max_logit_difference:.1e} over {self.tokens} tokens"
        divergence = f"{max(self.mean_kl_divergence, 0):.1e} nats per token"  # logits of bf16 differ by their rounding
        cast = self.dtype != self.elastic_dtype
        its, whose = (f"saved in {self.dtype}, ", f" in {self.elastic_dtype}") if cast else ("", "")
        found = f"by at most {difference}, predictions by {divergence} (mean KL)"
        return f"{its}logits differ from the elastic model's{whose} {found}"


def measure_parity(elastic: ElasticModel, shape: SubnetShape, checkpoint: Path) -> Parity:
    """Reload a checkpoint, with the adapter beside it if there is one, and compare its logits with the elastic model's
    at the shape it was cut from.
    """
    # A per-layer subnet is loaded by the file that was written beside it, which is this package's own.
    reloaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=(checkpoint / PER_LAYER_FILE).is_file()
    ).eval()
    separate = (checkpoint / ADAPTER_DIRECTORY).is_dir()
    served: nn.Module = (
        PeftModel.from_pretrained(reloaded, str(checkpoint / ADAPTER_DIRECTORY)) if separate else reloaded
    )
    return compare_logits(elastic, shape, served, "separate" if separate else "fold")


@torch.no_grad()
def compare_logits(
    elastic: ElasticModel, shape: SubnetShape, served: nn.Module, adapter: AdapterMode = "fold"
) -> Parity:
    """Compare a model's logits with those of the elastic model at the shape it was cut from; it is moved there."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(elastic.config.vocab_size, (1, PARITY_TOKENS), generator=generator).to(elastic.model.device)
    with elastic.active(shape) as model, evaluating(model):
        expected = model(tokens, use_cache=False).logits.float()
    found = nn.Module.to(served, tokens.device)(tokens, use_cache=False).logits.float()
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1).flatten(0, 1),
        expected.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    dtypes = named(next(served.parameters()).dtype), named(elastic.model.dtype)
    difference = (found - expected).abs().max().item()
    return Parity(str(shape), adapter, PARITY_TOKENS, difference, divergence.item(), *dtypes)


ModelT = TypeVar("ModelT", bound=nn.Module)


def with_parameters_in(model: ModelT, dtype: torch.dtype) -> ModelT:
    """Cast a model's parameters, as saving and loading it in that dtype does; buffers stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
