"""The demo's text: the source of Python's standard library, which is wherever Python is.

Held-out text is split **by module** (top-level name, hashed), so no file of a package is in both parts and the split is
the same for every Python version: a module held out when the demo model was trained is held out on every machine.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

Part = Literal["train", "held_out"]

# Tests repeat the library's vocabulary without its structure; `encodings` is 1.4 MB of generated code-page tables.
EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
)
HELD_OUT_PERCENT = 8


@dataclass(frozen=True)
class SourceFile:
    """One file of the standard library: ``module`` is its top-level name, ``text`` its decoded source."""

    module: str
    path: str
    text: str


def standard_library() -> list[SourceFile]:
    """Read the standard library's Python sources, sorted by path.

    Returns:
        Files in a fixed order; a file that is not UTF-8 is left out.

    Raises:
        FileNotFoundError: If this Python has no library sources on disk (a zipped or frozen installation).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [_read(root, path) for path in sorted(root.rglob("*.py")) if _is_library_source(path.relative_to(root))]
    found = [file for file in files if file is not None]
    if not found:
        raise FileNotFoundError(
            f"no Python sources under {root}: the demo's corpus is the standard library as text; "
            "run it with a Python that ships its .py files"
        )
    return found


def is_held_out(module: str) -> bool:
    """Tell whether a top-level module belongs to the held-out part: the same answer on every machine."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def part_files(part: Part) -> list[SourceFile]:
    """Return the files of one part of the corpus."""
    return [file for file in standard_library() if is_held_out(file.module) == (part == "held_out")]


def token_blocks(
    files: Iterable[SourceFile], tokenizer: PreTrainedTokenizerBase, block_size: int, limit: int | None = None
) -> Dataset:
    """Cut files into blocks of ``block_size`` tokens, each starting with BOS so that every text token is predicted.

    Args:
        files: Sources; each is followed by EOS, and blocks may span files.
        tokenizer: Its ``bos_token_id`` and ``eos_token_id`` must be set.
        block_size: Tokens per block, BOS included.
        limit: Most blocks to return; ``None`` for all. A last, incomplete block is dropped.

    Returns:
        Data set with ``input_ids``, ``attention_mask`` and ``labels``, lists of ``block_size`` ints; label 0 is -100
        (BOS).
    """
    rows = []
    for block in _chunks(_token_stream(files, tokenizer), block_size - 1):
        ids = [tokenizer.bos_token_id, *block]
        rows.append({"input_ids": ids, "attention_mask": [1] * block_size, "labels": [-100, *block]})
        if limit is not None and len(rows) >= limit:
            break
    return Dataset.from_list(rows)


def _is_library_source(relative: Path) -> bool:
    return not EXCLUDED_DIRECTORIES.intersection(relative.parts) and not relative.name.startswith(
        ("test_", "_sysconfigdata")
    )


def _read(root: Path, path: Path) -> SourceFile | None:
    relative = path.relative_to(root)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return SourceFile(module=relative.parts[0].removesuffix(".py"), path=relative.as_posix(), text=text)


def _token_stream(files: Iterable[SourceFile], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for file in files:
        yield from tokenizer(file.text, add_special_tokens=False)["input_ids"]
        yield tokenizer.eos_token_id


def _chunks(stream: Iterator[int], size: int) -> Iterator[list[int]]:
    block: list[int] = []
    for token in stream:
        block.append(token)
        if len(block) == size:
            yield block
            block = []
