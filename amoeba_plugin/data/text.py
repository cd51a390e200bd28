"""Calibration batches from a data set: raw text in blocks, or rows that are tokenised already."""

from __future__ import annotations

import hashlib
import logging
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from amoeba_plugin.data.bars import LARGE, without_bars
from amoeba_plugin.data.batch import IGNORED, Batch
from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.data.rows import collated, tell_empty, tokenised_rows
from amoeba_plugin.errors import DataError

logger = logging.getLogger(__name__)
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
ROWS_AT_ONCE = 64  # texts tokenised in one call
LONGEST_REASON = 300  # characters; the library lists all columns of all files
POOL = (
    4  # blocks are drawn from so many times as many as asked for, so that a sample is not one passage of one document
)


def load_batches(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    num_samples: int,
    max_seq_length: int,
    batch_size: int,
    vocab_size: int,
    text_column: str | None = None,
    seed: int,
) -> list[Batch]:
    """Load a data set and make batches of it.

    Raw text is tokenised, joined, and cut into blocks of ``max_seq_length`` tokens, each starting with BOS where the
    tokenizer has one. Rows that have ``input_ids`` already are used as they are, those too long cut at the end;
    multiple-choice rows (column ``question``) are never cut, and drawn by whole questions. Empty texts and rows are
    skipped, and the log says how many.

    Args:
        dataset: Directory written by ``save_to_disk``, a .json, .jsonl, .txt, .csv or .parquet file, or a hub id.
        tokenizer: Of the model.
        split: Split of the data set, such as "train" or "train[:10%]".
        num_samples: Rows or blocks drawn at random; fewer where there are no more.
        max_seq_length: Tokens.
        batch_size: Rows per batch; shorter ones are padded on the right.
        vocab_size: Tokens of the model, which rows have to be of.
        text_column: Where the text is; default: ``text``, or the only column of strings.
        seed: Same seed, same rows.

    Returns:
        What :func:`materialise` returns.

    Raises:
        DataError: If the data set cannot be read, is empty or too short, or lacks the column; if a row drawn has
            what is no token of the model.
    """
    rows, column = read_text(dataset, split, text_column)
    if min(num_samples, batch_size) < 1 or max_seq_length < 2:
        raise DataError(
            f"{num_samples} samples of {max_seq_length} tokens in batches of {batch_size} are impossible; "
            "take 1 or more samples, batches of 1 or more, and 2 tokens or more"
        )
    rng = random.Random(seed)
    if column is None:
        chosen = tokenised_rows(
            rows, num_samples, max_seq_length, rng, f"data set {dataset}, split {split}", vocab_size
        )
    else:
        chosen = _text_blocks(rows, column, dataset, tokenizer, num_samples, max_seq_length, rng)
    if len(chosen) < num_samples:
        logger.warning("data set %s gives %d samples where %d were asked for", dataset, len(chosen), num_samples)
    collate = PaddingCollator.padding_with(tokenizer.pad_token_id, vocab_size)
    batches = (collated(chosen[start : start + batch_size], collate) for start in range(0, len(chosen), batch_size))
    return materialise(batches, vocab_size=vocab_size)


def read_text(dataset: str, split: str, text_column: str | None) -> tuple[Any, str | None]:
    """Open one split of a data set and find its text; returned as rows, and their column, or none of tokens.

    Raises:
        DataError: If it cannot be read, is empty, or lacks the column.
    """
    rows = read_rows(dataset, split)
    if len(rows) == 0:
        raise DataError(f"data set {dataset}, split {split}, is empty; name a split with rows")
    return rows, None if "input_ids" in rows.column_names else _text_column(rows, dataset, text_column)


def read_rows(dataset: str, split: str) -> Any:
    """Open one split of a data set, from disk, from a file or from the hub.

    Raises:
        DataError: If it cannot be read.
    """
    # Imported here: selection on batches that a host hands over needs no data sets library.
    from datasets import DatasetDict, load_dataset, load_from_disk

    require_file(dataset)
    path = Path(dataset)
    try:
        if path.is_file():
            return _read_file(path, split)
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(dataset)
            if not isinstance(saved, DatasetDict):
                return saved
            if split not in saved:
                raise DataError(f"data set {dataset} has no split '{split}'; it has {', '.join(saved)}")
            return saved[split]
        fresh = "force_redownload" if path.is_dir() else None  # as in _read_file: what is cached may be older files
        return load_dataset(dataset, split=split, download_mode=fresh)
    except DataError:
        raise
    except Exception as error:  # builders of the data sets library raise anything, from any parser
        there = "" if path.exists() else "it is no path here, and of the hub: "
        raise DataError(
            f"data set {dataset}, split {split}, cannot be read: {there}{_reason(error)}. Give a directory written by "
            f"save_to_disk, a file ({', '.join(FILE_FORMATS)}), or the id of a data set on the hub"
        ) from error


def _read_file(path: Path, split: str) -> Any:
    from datasets import load_dataset

    if path.suffix not in FILE_FORMATS:
        raise DataError(f"file {path} has none of the endings {', '.join(FILE_FORMATS)}; convert it to one of them")
    with path.open("rb") as file:  # the library's cache knows files by path and time, which another file can have
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    options = {"sample_by": "document"} if path.suffix == ".txt" else {}
    files = {split.partition("[")[0]: str(path)}
    with without_bars(path.stat().st_size < LARGE):
        return load_dataset(FILE_FORMATS[path.suffix], digest, data_files=files, split=split, **options)


def require_file(dataset: str) -> None:
    """Refuse what is named like a file and is not there; a hub would be asked for it.

    Raises:
        DataError: If there is no such file.
    """
    path = Path(dataset)
    if path.suffix in FILE_FORMATS and not path.exists():
        raise DataError(f"data set {dataset}: no such file in {path.absolute().parent}; name one that is there")


def _reason(error: Exception) -> str:
    # What the library says of a file without rows is for its authors: "list index out of range", "StopIteration".
    if isinstance(error, IndexError | StopIteration) or "corresponds to no data" in str(error):
        return "it is empty"
    if isinstance(error.__cause__, Exception):  # "An error occurred while generating the dataset"
        return _reason(error.__cause__)
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return words if len(words) < LONGEST_REASON else f"{words[:LONGEST_REASON]} ..."


def _text_column(rows: Any, dataset: str, wanted: str | None) -> str:
    names: list[str] = rows.column_names
    strings = [name for name in names if getattr(rows.features[name], "dtype", None) in ("string", "large_string")]
    found = wanted or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if found not in strings:
        asked = f"column '{wanted}' of strings" if wanted else "column text, nor a single column of strings"
        raise DataError(
            f"data set {dataset} has no {asked}; its columns are {', '.join(names)}: name the one with the text "
            "in text_column (--text-column)"
        )
    return found


def _text_blocks(
    rows: Any, column: str, dataset: str, tokenizer: Any, num_samples: int, length: int, rng: random.Random
) -> list[dict[str, Any]]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = length - len(bos)
    tokens: list[int] = []
    read = empty = 0
    # Texts follow one another from a random one on, so that lines of one document stay together.
    first = rng.randrange(len(rows))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        indices = [(first + index) % len(rows) for index in range(start, min(start + ROWS_AT_ONCE, len(rows)))]
        texts = [text for text in rows[indices][column] if text]
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        whole = [ids for ids in found if ids]
        read, empty = read + len(indices), empty + len(indices) - len(whole)
        for ids in whole:
            tokens += [*ids, *eos]
        if len(tokens) >= POOL * num_samples * size:
            break
    blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    if not tokens:
        raise DataError(f"data set {dataset} has no text in column {column}; give one that has")
    tell_empty(f"data set {dataset}", empty, read)
    if not blocks:
        raise DataError(
            f"data set {dataset} is too short: {len(tokens)} tokens, and one sample takes {size}; "
            f"give more text, or a max_seq_length (--max-seq-length) of {max(len(tokens), 2)} or less"
        )
    chosen = rng.sample(blocks, min(num_samples, len(blocks)))
    return [{"input_ids": bos + block, "labels": [IGNORED] * len(bos) + block} for block in chosen]
