"""A compact model as it is kept: heads in safetensors, and beside them what they are of."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.documents import Document, Part
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.serving.compact.encoder import EncoderRecord, load_encoder
from amoeba_plugin.serving.compact.features import Features, PromptFeatures
from amoeba_plugin.serving.compact.heads import Choices, DecisionHead, ScoreHead
from amoeba_plugin.serving.compact.reader import CompactModel
from amoeba_plugin.shape import SubnetShape

DOCUMENT, WEIGHTS = "compact.json", "compact.safetensors"


class Tuned(Part):
    """How it was made.

    Attributes:
        questions: That it was trained on.
        labels: Of scores.
        explained: Share of the variance of held-out labels that the scores explain.
        nats: Held-out cross-entropy of one answer.
        cpu_seconds: Of labels and training.
        right: Share of the questions answered right, by shape and share, in the order of those.
    """

    questions: int
    labels: str
    explained: float
    nats: float
    cpu_seconds: float
    right: list[list[float]]


class CompactDocument(Document):
    """What lies in ``compact.json``.

    Attributes:
        version: Of the format.
        fingerprint: Of the elastic model's base and order of channels.
        layers: That features are taken behind; ``None``: an encoder's are taken.
        size: Of a token's features.
        shapes: That the decision head scores, as ``DEPTHxWIDTH``.
        shares: Of the droppable tokens, as fractions.
        tuned: How it was made.
        encoder: That reads prompts; ``None``: the elastic model's first layers do.
    """

    what: ClassVar[str] = "a compact model that `amoeba tune-decisions` made"
    version: int = 1
    fingerprint: str
    layers: int | None = None
    size: int
    shapes: list[str]
    shares: list[str]
    tuned: Tuned
    encoder: EncoderRecord | None = None


def save_compact(model: CompactModel, fingerprint: str, tuned: Tuned, directory: Path) -> None:
    """Write it; the document last, so that what was not finished is none."""
    assert model.decisions is not None
    state = {f"scores.{name}": each for name, each in model.scores.state_dict().items()}
    state |= {f"decisions.{name}": each for name, each in model.decisions.state_dict().items()}
    write_atomically(directory / WEIGHTS, save({name: each.contiguous() for name, each in state.items()}))
    CompactDocument(
        fingerprint=fingerprint, layers=getattr(model.features, "layers", None), size=model.features.size,
        encoder=getattr(model.features, "record", None),
        shapes=[str(shape) for shape in model.choices.shapes], shares=[str(share) for share in model.choices.shares],
        tuned=tuned,
    ).save(directory / DOCUMENT)  # fmt: skip


def load_compact(
    directory: Path, live: ElasticModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[CompactModel, CompactDocument]:
    """Read one for an elastic model.

    Args:
        directory: That ``amoeba tune-decisions`` wrote.
        live: The elastic model.
        tokenizer: Its; needed where an encoder reads prompts.

    Raises:
        ArtifactError: If there is none, it is damaged, it belongs to another model or space, or its encoder is not
            there, or another one.
    """
    about = CompactDocument.load(directory / DOCUMENT)
    wrong = f"{directory} is a compact model of"
    if about.version != 1:
        raise ArtifactError(f"{wrong} version {about.version}, and this package reads 1; tune it anew")
    if about.fingerprint != live.strategy.fingerprint:
        raise ArtifactError(f"{wrong} another elastic model; `amoeba tune-decisions` makes one of this")
    try:
        choices = Choices(tuple(map(SubnetShape.parse, about.shapes)), tuple(map(Fraction, about.shares)))
    except ValueError as error:
        raise ArtifactError(f"{directory / DOCUMENT} is damaged ({error}); copy it anew") from error
    if missing := sorted({str(shape) for shape in choices.shapes} - {str(shape) for shape in live.space}):
        raise ArtifactError(f"{wrong} shapes that the elastic model has not ({', '.join(missing)}); tune it anew")
    features = _features(directory, about, live, tokenizer)
    scores, decisions = ScoreHead(about.size), DecisionHead(about.size, choices)
    try:
        if about.size != features.size:
            raise RuntimeError(f"features have {about.size} channels, the model has {features.size}")
        state = load_file(directory / WEIGHTS)
        for name, head in (("scores.", scores), ("decisions.", decisions)):
            head.load_state_dict({key.removeprefix(name): each for key, each in state.items() if key.startswith(name)})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{directory / WEIGHTS} is damaged, or of another model ({error}); copy it anew") from error
    return CompactModel(features, scores, decisions, choices), about


def _features(
    directory: Path, about: CompactDocument, live: ElasticModel, tokenizer: PreTrainedTokenizerBase | None
) -> PromptFeatures:
    if about.encoder is None:
        return Features(live, about.layers)
    if tokenizer is None:
        raise ArtifactError(f"{directory} has an encoder, which reads texts; hand over the elastic model's tokenizer")
    return load_encoder(about.encoder.named, tokenizer, about.encoder)
