"""A subnet's tokenizer and chat template, and whether an engine has them as transformers does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.model_files import load_tokenizer

TEXTS = Path(__file__).with_name("texts.json")
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SAID = "Paris is."


@dataclass(frozen=True)
class Texts:
    """What engines are compared on: ``passages`` of some dozen tokens, and ``texts`` that tokenizers trip over."""

    passages: Sequence[str]
    texts: Sequence[str]

    @property
    def all(self) -> list[str]:
        """Both."""
        return [*self.passages, *self.texts]


@cache
def shipped_texts() -> Texts:
    """Return the texts that come with the package: prose, code, numbers, white space, a dozen scripts."""
    found = json.loads(TEXTS.read_text(encoding="utf-8"))
    return Texts(found["passages"], found["texts"])


def mended(subnet: Path, directory: Path) -> tuple[Path, list[str]]:
    """Return a checkpoint whose tokenizer engines read as transformers does, and what was mended, in sentences.

    Two faults that transformers does not mind and engines do: ``byte_fallback`` on a byte-level BPE, by which llama.cpp
    takes it for another kind and aborts; and an end token that the chat template does not end turns with, so that no
    answer ever ends.

    Args:
        subnet: Left as it is.
        directory: For the mended copy, whose weights are links; used only where something is mended.
    """
    changed: dict[str, Mapping[str, Any]] = {}
    told = []
    whole = _read(subnet / TOKENIZER)
    if whole and whole["model"].get("byte_fallback") and _is_byte_level(whole):
        changed[TOKENIZER] = {**whole, "model": {**whole["model"], "byte_fallback": False}}
        told.append("byte_fallback is off: the tokenizer works on bytes, and llama.cpp would take it for another kind")
    end = _end_of_turn(subnet)
    if end is not None:
        token, number = end
        ends = _ids(_read(subnet / GENERATION).get("eos_token_id", _read(subnet / "config.json").get("eos_token_id")))
        declared = _read(subnet / TOKENIZER_CONFIG).get("eos_token")
        if number not in ends or (declared.get("content") if isinstance(declared, dict) else declared) != token:
            changed[TOKENIZER_CONFIG] = {**_read(subnet / TOKENIZER_CONFIG), "eos_token": token}
            changed[GENERATION] = {**_read(subnet / GENERATION), "eos_token_id": [number, *(ends - {number})]}
            changed["config.json"] = {**_read(subnet / "config.json"), "eos_token_id": number}
            told.append(f"{token} ends generation, as it ends every turn of the chat template")
    if not changed:
        return subnet, []
    shutil.copytree(subnet, directory, copy_function=_link, dirs_exist_ok=True)
    for name, content in changed.items():
        (directory / name).unlink(missing_ok=True)
        write_atomically(directory / name, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return directory, told


def require_same_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], found: Sequence[list[int]]) -> None:
    """Refuse an engine that makes other tokens of texts than transformers.

    Raises:
        DeploymentError: With the first text, and both.
    """
    for text, ids in zip(texts, found, strict=True):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        if list(ids) != list(expected):
            raise DeploymentError(
                f"the engine's tokenizer is another: {text[:40]!r} is {_shown(ids)} to it and {_shown(expected)} to "
                "transformers; its answers would be nonsense. Nothing was written"
            )


def rendered(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a question as the chat template writes it; ``None`` where there is none."""
    if not tokenizer.chat_template:
        return None
    return str(tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True))


def _end_of_turn(subnet: Path) -> tuple[str, int] | None:
    """Return the special token that the chat template writes behind an answer."""
    tokenizer = load_tokenizer(str(subnet))
    if not tokenizer.chat_template:
        return None
    turn = [*QUESTION, {"role": "assistant", "content": SAID}]
    _, _, behind = str(tokenizer.apply_chat_template(turn, tokenize=False)).rpartition(SAID)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    return next(((added[number], number) for number in ids if number in added), None)


def _is_byte_level(whole: Mapping[str, Any]) -> bool:
    steps = whole.get("pre_tokenizer") or {}
    return any(each.get("type") == "ByteLevel" for each in steps.get("pretokenizers", [steps]))


def _ids(given: Any) -> set[int]:
    return set(given) if isinstance(given, list) else set() if given is None else {int(given)}


def _shown(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _link(source: str, target: str) -> str:
    Path(target).symlink_to(Path(source).resolve())
    return target
