"""What the compact model sees of a prompt where an encoder of its own reads it, such as the paper's MobileBERT."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.documents import Part
from amoeba_plugin.runtime.hub import require_answering
from amoeba_plugin.runtime.model_files import why_not
from amoeba_plugin.serving.compact.spans import Span, mapped, spans_of

WINDOW = 512  # tokens that are read at a time, at most
POOLER = "pooler"  # of the whole text; what tokens have does not come through it, and many checkpoints lack it


class EncoderRecord(Part):
    """Which encoder it is.

    Attributes:
        name: Id of the hub, or an absolute path.
        revision: Of the hub, a commit; ``None``: it is a path.
        digest: Of its weights and of its vocabulary.
    """

    name: str
    revision: str | None
    digest: str

    @property
    def named(self) -> str:
        """As :func:`load_encoder` takes it."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


class EncoderFeatures:
    """An encoder that reads a prompt's text; its weights stay as they are.

    What it makes of its own tokens goes to the model's by the characters that both stand for. Texts that are longer
    than it can read are read in pieces.

    Args:
        record: Which encoder that is.
        model: In evaluation mode from now on.
        words: Its tokenizer, a fast one.
        tokenizer: Of the elastic model.
    """

    def __init__(
        self, record: EncoderRecord, model: PreTrainedModel, words: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:  # fmt: skip
        self.record, self.size = record, int(model.config.get_text_config().hidden_size)
        self._model, self._words, self._tokenizer = model.eval(), words, tokenizer
        positions = getattr(model.config, "max_position_embeddings", None) or WINDOW
        self._room = min(WINDOW, positions, words.model_max_length)

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return what the encoder makes of the text of a model's tokens, (tokens, size), fp32, on the CPU."""
        text, spans = spans_of(self._tokenizer, tokens)
        values, held = self.read(text)
        return mapped(values, held, spans)

    @torch.no_grad()
    def read(self, text: str) -> tuple[Tensor, list[Span]]:
        """Return what the encoder makes of a text, (its tokens, size), and which characters its tokens are."""
        found = self._words(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, held = list(found["input_ids"]), [(int(start), int(end)) for start, end in found["offset_mapping"]]
        ends = self._words.cls_token_id, self._words.sep_token_id
        before, behind = ([] if each is None else [each] for each in ends)
        size, values = self._room - len(before) - len(behind), [torch.zeros(0, self.size)]
        for at in range(0, len(ids), size):
            piece = ids[at : at + size]
            hidden = self._model(torch.tensor([[*before, *piece, *behind]])).last_hidden_state[0]
            values.append(hidden[len(before) : len(before) + len(piece)].float())
        return torch.cat(values), held


def load_encoder(named: str, tokenizer: PreTrainedTokenizerBase, known: EncoderRecord | None = None) -> EncoderFeatures:
    """Load an encoder by transformers.

    Args:
        named: Id of the hub, or ``ID@REVISION``, or a path.
        tokenizer: Of the elastic model.
        known: That it must be.

    Raises:
        ArtifactError: If there is none, it is no encoder, it lacks weights, its tokenizer does not say where its tokens
            stand, or it is not the one that is known.
    """
    local = Path(named).exists()
    name, _, revision = (named, "", "") if local else named.partition("@")
    model, words, digest = _loaded(name, revision or None)
    if known is not None and digest != known.digest:
        raise ArtifactError(
            f"'{name}' is not the encoder that the compact model was made with: its weights or its vocabulary are "
            "others; put that one back, or tune it anew"
        )
    commit = None if local else getattr(model.config, "_commit_hash", None) or revision or None
    record = EncoderRecord(name=str(Path(name).resolve()) if local else name, revision=commit, digest=digest)
    return EncoderFeatures(record, model, words, tokenizer)


def _loaded(name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return an encoder, its tokenizer, and the digest of both."""
    try:
        require_answering(name)
        model, told = AutoModel.from_pretrained(
            name, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        words = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises anything of what is no model, or wants another package
        raise ArtifactError(
            f"the encoder '{name}' cannot be loaded: {why_not(name, error)} Give a directory that save_pretrained "
            "wrote, or a hub id, with safetensors and a tokenizer"
        ) from error
    if model.config.is_encoder_decoder:
        raise ArtifactError(f"'{name}' is an encoder with a decoder; give an encoder alone, such as a BERT")
    if not words.is_fast:
        raise ArtifactError(
            f"the tokenizer of '{name}' does not say where tokens stand; give one with a fast tokenizer"
        )
    lacks = sorted(told["missing_keys"])  # the library makes them up, anew each time
    if wrong := [each for each in lacks if POOLER not in each]:
        raise ArtifactError(f"'{name}' lacks {len(wrong)} weights, such as {wrong[0]}; give a checkpoint that is whole")
    return model, words, _digest(model, words, lacks)


def _digest(model: PreTrainedModel, words: PreTrainedTokenizerBase, without: Sequence[str]) -> str:
    found = hashlib.sha256(json.dumps(sorted(words.get_vocab().items())).encode())
    for name, each in sorted(model.state_dict().items()):
        if name not in without:
            found.update(f"{name} {tuple(each.shape)} {each.dtype}".encode())
            found.update(each.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
