"""How far an engine's answers are from torch's: on the same tokens, by the engine itself.

Unquantized, that proves the mapping into its format; quantized, it is the damage of the scheme, told beside that of the
whole model.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.engines.torch_engine import load_checkpoint
from amoeba_plugin.deployment.flow import DeploymentFlow, Export, Point
from amoeba_plugin.deployment.tokenizers import QUESTION, rendered, require_same_tokens, shipped_texts
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.runtime.model_files import load_tokenizer

LARGEST_DIFFERENCE = 0.01  # of the range of logits, unquantized
WORSE_THAN_WHOLE = 2.0  # times the whole model's divergence at the same scheme
STEP, LONGEST = 6, 72  # tokens: every so many a position is compared, up to so many of a passage
CONTEXT = 512


@dataclass(frozen=True)
class EngineParity:
    """What an engine makes of a deployed subnet, against torch in fp32.

    Attributes:
        point: ``flow:scheme``.
        engine: What computed, with its version.
        positions: That were compared, in real text.
        max_difference: The largest of log-probabilities, of all tokens at all positions.
        logit_range: Between the largest and the smallest logit of a position, mean.
        mean_kl: Nats per token, of the engine's predictions from torch's.
        same_top: Share of positions with the same likeliest token.
        same_tokens: How many texts became the same tokens; ``None``: there is no tokenizer.
        same_template: Whether a chat is written the same; ``None``: there is no template.
        whole_mean_kl: Of the whole model at the same scheme; ``None``: the scheme is exact.
        whole_same_top: Likewise.
        mended: What was mended of the tokenizer, in sentences.
    """

    point: str
    engine: str
    positions: int
    max_difference: float
    logit_range: float
    mean_kl: float
    same_top: float
    same_tokens: int | None = None
    same_template: bool | None = None
    whole_mean_kl: float | None = None
    whole_same_top: float | None = None
    mended: tuple[str, ...] = ()

    @property
    def in_words(self) -> str:
        """The differences as a sentence."""
        whole = "" if self.whole_mean_kl is None else (
            f"; the whole model's are {self.whole_mean_kl:.2g} nats off at it, {self.whole_same_top:.0%} the same"
        )  # fmt: skip
        return (
            f"{self.engine}: logits differ from torch's by at most {self.max_difference / self.logit_range:.2%} of "
            f"their range over {self.positions} positions, predictions by {self.mean_kl:.2g} nats per token (mean KL), "
            f"{self.same_top:.0%} have the same first token{whole}"
        )

    def require_close(self, exact: bool) -> None:
        """Refuse a mapping that is wrong, or a scheme that breaks this subnet more than the whole model.

        Args:
            exact: Whether the scheme leaves logits as they are.

        Raises:
            DeploymentError: If so.
        """
        if exact and self.max_difference > LARGEST_DIFFERENCE * self.logit_range:
            raise DeploymentError(
                f"{self.point} computes something else than the subnet: {self.in_words}. That is a fault of the "
                "export, not of the subnet; nothing was written"
            )
        if self.whole_mean_kl is not None and self.mean_kl > WORSE_THAN_WHOLE * self.whole_mean_kl:
            raise DeploymentError(
                f"{self.point} harms this subnet {self.mean_kl / self.whole_mean_kl:.1f} times as much as the whole "
                f"model: {self.in_words}. Take a finer scheme or another shape; nothing was written"
            )

    def beside(self, whole: EngineParity) -> EngineParity:
        """Return it with what the whole model has at the same scheme."""
        return replace(self, whole_mean_kl=whole.mean_kl, whole_same_top=whole.same_top)


def measure_engine(
    flow: DeploymentFlow, point: Point, export: Export, directory: Path, checkpoint: Path, mended: Sequence[str] = ()
) -> EngineParity:
    """Run an export in its engine, and compare tokens, template and log-probabilities with transformers.

    Args:
        flow: Of the engine.
        point: Its scheme.
        export: What is in ``directory``.
        directory: Of the export.
        checkpoint: That was exported.
        mended: What had to be mended of its tokenizer.

    Raises:
        DeploymentError: If the engine fails, or reads text otherwise.
    """
    has_tokenizer = (checkpoint / "tokenizer.json").is_file() or (checkpoint / "tokenizer.model").is_file()
    tokenizer = load_tokenizer(str(checkpoint)) if has_tokenizer else None
    model = load_checkpoint(checkpoint, torch.float32)
    texts = shipped_texts()
    passages = _passages(model, [] if tokenizer is None else [tokenizer(text)["input_ids"] for text in texts.passages])
    with EngineProcess(flow.name, flow.command()) as engine:
        about = engine.ask("about").value
        options = {**flow.options(point.scheme), **flow.exact_options(point.scheme)}
        engine.ask("load", path=str(directory / export.entry), threads=1, context=CONTEXT, batch=1, **options)
        same_template = None
        if tokenizer is not None:
            require_same_tokens(tokenizer, texts.all, engine.ask("tokenize", texts=texts.all).value)
            expected = rendered(tokenizer)
            same_template = None if expected is None else engine.ask("render", messages=QUESTION).value == expected
            if same_template is False:
                raise DeploymentError(
                    f"{point} writes a chat otherwise than the model's own template; nothing was written"
                )
        found, wanted = [], []
        for tokens in passages:
            behind = [*range(STEP, len(tokens) + 1, STEP)]
            rows = engine.ask("log_probabilities", tokens=tokens, behind=behind).value
            found += [np.frombuffer(base64.b64decode(each), "<f4").astype(np.float64) for each in rows]
            wanted += _in_torch(model, tokens, behind)
    return compared(
        np.stack(found), np.stack(wanted), point=str(point), engine=" ".join(about.values()),
        same_tokens=None if tokenizer is None else len(texts.all), same_template=same_template, mended=tuple(mended),
    )  # fmt: skip


def _passages(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return tokens to compare on: of real text, or, without a tokenizer, any."""
    if texts:
        return [list(each[:LONGEST]) for each in texts]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (8, LONGEST), generator=generator).tolist()


@torch.inference_mode()
def _in_torch(model: PreTrainedModel, tokens: list[int], behind: Sequence[int]) -> list[NDArray[np.float64]]:
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
    return [logits[count - 1].numpy() for count in behind]


def compared(found: NDArray[np.float64], wanted: NDArray[np.float64], **told: object) -> EngineParity:
    """Compare log-probabilities, (positions, vocabulary), in nats; an engine's fp32 sums are not quite 1."""
    found = found - np.log(np.exp(found).sum(-1, keepdims=True))
    divergence = (np.exp(wanted) * (wanted - found)).sum(-1).mean()
    return EngineParity(
        positions=len(found),
        max_difference=float(np.abs(found - wanted).max()),
        logit_range=float((wanted.max(-1) - wanted.min(-1)).mean()),
        mean_kl=float(divergence),
        same_top=float((found.argmax(-1) == wanted.argmax(-1)).mean()),
        **told,  # type: ignore[arg-type]
    )
