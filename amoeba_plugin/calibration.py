"""Calibration data, drawn once, and the statistics of what flows into each channel group's consumer."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amoeba_plugin.architecture import ArchitectureAdapter, ChannelGroup, group_key
from amoeba_plugin.batching import PaddingCollator
from amoeba_plugin.errors import DataError
from amoeba_plugin.experts import expert_inputs
from amoeba_plugin.hosted import input_device
from amoeba_plugin.objectives import IGNORED, evaluating, model_inputs, target_counts
from amoeba_plugin.ranks import sum_over_ranks

Batch = dict[str, Tensor]
logger = logging.getLogger(__name__)

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
SEQUENCE_COLUMNS = ("input_ids", "attention_mask", "labels")
ROWS_AT_ONCE = 64  # texts tokenised in one call
POOL = (
    4  # blocks are drawn from so many times as many as asked for, so that a sample is not one passage of one document
)


@dataclass(frozen=True)
class ActivationStats:
    """Mean and spread of the inputs of one linear, per channel, over tokens.

    Two of them merge into what one pass over all tokens would have given, however the tokens were cut into batches.

    >>> left, right = ActivationStats.of(torch.tensor([[1.0], [3.0]])), ActivationStats.of(torch.tensor([[5.0]]))
    >>> both = left.merge(right)
    >>> both.tokens, both.mean.item(), both.variance.item()
    (3, 3.0, 2.6666666666666665)

    Attributes:
        tokens: Tokens seen; padding does not count.
        mean: (channels,) fp64.
        sum_squared_deviation: (channels,) fp64, sum over tokens of (x - mean)^2.
    """

    tokens: int
    mean: Tensor
    sum_squared_deviation: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> ActivationStats:
        """Return the statistics of (tokens, channels)."""
        values = inputs.detach().to("cpu" if inputs.device.type == "mps" else inputs.device, torch.float64)
        if not len(values):
            return cls.empty(inputs.shape[-1])
        mean = values.mean(dim=0)
        return cls(len(values), mean.cpu(), (values - mean).square().sum(dim=0).cpu())

    @classmethod
    def empty(cls, channels: int) -> ActivationStats:
        """Return the statistics of no tokens."""
        return cls(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    @property
    def variance(self) -> Tensor:
        """(channels,), mean over tokens of (x - mean)^2."""
        return self.sum_squared_deviation / max(self.tokens, 1)

    @property
    def second_moment(self) -> Tensor:
        """(channels,), mean over tokens of x^2."""
        return self.variance + self.mean.square()

    def over_ranks(self) -> ActivationStats:
        """Return the statistics of the tokens of all ranks together."""
        tokens = sum_over_ranks(torch.tensor(self.tokens))
        mean = sum_over_ranks(self.mean * self.tokens) / tokens.clamp(min=1)
        between = (self.mean - mean).square() * self.tokens
        return ActivationStats(int(tokens), mean, sum_over_ranks(self.sum_squared_deviation + between))

    def merge(self, other: ActivationStats) -> ActivationStats:
        """Return the statistics of both sets of tokens together."""
        tokens = self.tokens + other.tokens
        if not tokens:
            return self
        # Chan, Golub, LeVeque 1983: d = mean_b - mean_a; mean = mean_a + d n_b/n; M2 = M2_a + M2_b + d^2 n_a n_b / n
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.tokens / tokens)
        between = difference.square() * (self.tokens * other.tokens / tokens)
        return ActivationStats(tokens, mean, self.sum_squared_deviation + other.sum_squared_deviation + between)


def materialise(loader: Iterable[Mapping[str, Any]] | None, device: torch.device | str | None = None) -> list[Batch]:
    """Draw all batches of a loader once, so that everything that follows sees the same data.

    Args:
        loader: Yields mappings with ``input_ids`` (batch, positions); columns that are not numbers are left out.
        device: Where to put the tensors; default: where they are.

    Returns:
        Batches with ``input_ids``, ``attention_mask`` (default: ones), ``labels`` (default: ``input_ids``, -100 on
        padding), and whatever other numeric columns there are.

    Raises:
        DataError: If there is no data, no ``input_ids``, columns that do not align with them, or nothing to predict
            because every sequence is too short.
    """
    if loader is None:
        raise DataError(
            "there is no calibration data: selection measures the model on text; pass dataset=... (--dataset)"
        )
    batches = [_complete(batch, number, device) for number, batch in enumerate(loader)]
    if not batches:
        raise DataError("the calibration data is empty; pass a data set with rows, and num_calibration_samples above 0")
    if not any(int(target_counts(batch).sum()) for batch in batches):
        longest = max(int(batch["attention_mask"].sum(dim=1).max()) for batch in batches)
        raise DataError(
            f"the calibration data is too short: nothing to predict in {len(batches)} batches, whose longest "
            f"sequence has {longest} token(s); pass texts of two tokens or more (a few hundred are usual) with labels"
        )
    _tell_single_tokens(batches)
    return batches


def _tell_single_tokens(batches: Sequence[Batch]) -> None:
    lengths = torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches])
    short = int((lengths < 2).sum())
    if short:
        logger.warning(
            "%d of %d calibration sequences have one token or none: nothing can be predicted in them, so that only "
            "statistics of activations see them; leave them out, or join texts",
            short,
            len(lengths),
        )


def _complete(given: Mapping[str, Any], number: int, device: torch.device | str | None) -> Batch:
    batch = {
        name: tensor.detach().to(device) for name, value in given.items() if (tensor := _as_tensor(value)) is not None
    }
    if "input_ids" not in batch:
        raise DataError(
            f"calibration batch {number} has no input_ids, only {', '.join(given) or 'nothing'}; tokenise the data set"
        )
    ids = batch["input_ids"]
    if ids.dim() != 2:
        raise DataError(
            f"input_ids of calibration batch {number} have shape {tuple(ids.shape)}; (batch, positions) is wanted"
        )
    for name in SEQUENCE_COLUMNS:
        if name in batch and batch[name].shape != ids.shape:
            raise DataError(
                f"calibration batch {number} has input_ids {tuple(ids.shape)} and {name} {tuple(batch[name].shape)}; "
                "give one value per token"
            )
    mask = batch.setdefault("attention_mask", torch.ones_like(ids))
    if "labels" not in batch:
        labels = ids.masked_fill(mask == 0, IGNORED)
        # After left padding, the first token would be predicted from a padded position.
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)
        batch["labels"] = labels
    return batch


def _as_tensor(value: Any) -> Tensor | None:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def collect_statistics(
    model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch], progress: bool = True
) -> dict[str, ActivationStats]:
    """Run the dense model over the batches once and watch the input of every channel group's consumer.

    Args:
        model: Left as it was; hooks are removed after an exception too.
        adapter: Its architecture.
        batches: From :func:`materialise`; padded tokens do not count.
        progress: Show a progress bar.

    Returns:
        Statistics by ``group_key(layer, group)``, of the batches of all ranks where there are several.

    Raises:
        DataError: If there are no tokens, or an input is NaN or infinite; layer and batch are named.
    """
    if not any(bool(batch["attention_mask"].any()) for batch in batches):
        raise DataError("no token to collect statistics from: the calibration data is empty or all padding; pass texts")
    seen: dict[str, ActivationStats] = {}
    number, present = -1, torch.empty(0, dtype=torch.bool)  # of the running batch; present is (batch, positions)

    def watch(key: str, group: ChannelGroup) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = present.flatten().to(args[0].device)
            if group.consumer.expert is None:
                tokens = args[0].flatten(0, -2)[rows]  # OPT calls its MLP with batch and positions as one axis
            else:
                tokens = expert_inputs(group, module, args, rows)
            stats = ActivationStats.of(tokens)
            if not bool(torch.isfinite(stats.sum_squared_deviation).all()):
                raise DataError(
                    f"activations of {key} are NaN or infinite on calibration batch {number}; load the model in "
                    "bfloat16 or float32 instead of float16, and look at that batch"
                )
            seen[key] = seen[key].merge(stats) if key in seen else stats

        return hook

    handles: list[RemovableHandle] = []
    try:
        for index, layer in enumerate(adapter.layers(model)):
            for group in adapter.channel_groups(model.config):
                consumer = layer.get_submodule(group.consumer.path)
                handles.append(consumer.register_forward_pre_hook(watch(group_key(index, group), group)))
        with evaluating(model):
            for batch in tqdm(batches, desc="activation statistics", unit="batch", disable=not progress):
                number, present = number + 1, batch["attention_mask"].bool()
                adapter.decoder(model)(**model_inputs(batch, input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    seen = {key: stats.over_ranks() for key, stats in seen.items()}
    idle = [key for key, stats in seen.items() if not stats.tokens]
    if idle:
        logger.warning(
            "no calibration token reached %d of %d experts (%s, ...), whose neurons keep the order they have; "
            "give more calibration data",
            len(idle),
            sum(key.count(".") == 2 for key in seen),
            idle[0],
        )
    return seen


def load_batches(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    num_samples: int,
    max_seq_length: int,
    batch_size: int,
    text_column: str | None = None,
    seed: int,
) -> list[Batch]:
    """Load a data set and make batches of it.

    Raw text is tokenised, joined, and cut into blocks of ``max_seq_length`` tokens, each starting with BOS where the
    tokenizer has one. Rows that have ``input_ids`` already are used as they are, those too long cut at the end;
    multiple-choice rows (column ``question``) are never cut, and drawn by whole questions.

    Args:
        dataset: Directory written by ``save_to_disk``, a .json, .jsonl, .txt, .csv or .parquet file, or a hub id.
        tokenizer: Of the model.
        split: Split of the data set, such as "train" or "train[:10%]".
        num_samples: Rows or blocks drawn at random; fewer where there are no more.
        max_seq_length: Tokens.
        batch_size: Rows per batch; shorter ones are padded on the right.
        text_column: Where the text is; default: ``text``, or the only column of strings.
        seed: Same seed, same rows.

    Returns:
        What :func:`materialise` returns.

    Raises:
        DataError: If the data set cannot be read, is empty or too short, or lacks the column.
    """
    rows = read_rows(dataset, split)
    if len(rows) == 0:
        raise DataError(f"data set {dataset}, split {split}, is empty; name a split with rows")
    if min(num_samples, batch_size) < 1 or max_seq_length < 2:
        raise DataError(
            f"{num_samples} samples of {max_seq_length} tokens in batches of {batch_size} are impossible; "
            "take 1 or more samples, batches of 1 or more, and 2 tokens or more"
        )
    rng = random.Random(seed)
    if "input_ids" in rows.column_names:
        chosen = _tokenised_rows(rows, num_samples, max_seq_length, rng)
    else:
        column = _text_column(rows, dataset, text_column)
        chosen = _text_blocks(rows, column, dataset, tokenizer, num_samples, max_seq_length, rng)
    if len(chosen) < num_samples:
        logger.warning("data set %s gives %d samples where %d were asked for", dataset, len(chosen), num_samples)
    collate = PaddingCollator(tokenizer.pad_token_id or 0)
    return materialise(
        collated(chosen[start : start + batch_size], collate) for start in range(0, len(chosen), batch_size)
    )


def read_rows(dataset: str, split: str) -> Any:
    """Open one split of a data set, from disk, from a file or from the hub.

    Raises:
        DataError: If it cannot be read.
    """
    # Imported here: selection on batches that a host hands over needs no data sets library.
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(dataset)
    try:
        if path.is_file():
            if path.suffix not in FILE_FORMATS:
                raise DataError(
                    f"file {dataset} has none of the endings {', '.join(FILE_FORMATS)}; convert it to one of them"
                )
            options = {"sample_by": "document"} if path.suffix == ".txt" else {}
            files = {split.partition("[")[0]: str(path)}
            return load_dataset(FILE_FORMATS[path.suffix], data_files=files, split=split, **options)
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(dataset)
            if not isinstance(saved, DatasetDict):
                return saved
            if split not in saved:
                raise DataError(f"data set {dataset} has no split '{split}'; it has {', '.join(saved)}")
            return saved[split]
        return load_dataset(dataset, split=split)
    except DataError:
        raise
    except Exception as error:  # builders of the data sets library raise anything, from any parser
        raise DataError(
            f"data set {dataset}, split {split}, cannot be read: {_reason(error)}. Give a directory written by "
            f"save_to_disk, a file ({', '.join(FILE_FORMATS)}), or the id of a data set on the hub"
        ) from error


def _reason(error: Exception) -> str:
    # What the library says of a file without rows is for its authors: "list index out of range", "StopIteration".
    if isinstance(error, IndexError | StopIteration) or "corresponds to no data" in str(error):
        return "it is empty"
    return str(error).strip() or type(error).__name__


def _text_column(rows: Any, dataset: str, wanted: str | None) -> str:
    names: list[str] = rows.column_names
    strings = [name for name in names if getattr(rows.features[name], "dtype", None) in ("string", "large_string")]
    found = wanted or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if found not in strings:
        asked = (
            f"column '{wanted}' of strings" if wanted else "input_ids, and no column of strings that must be the text"
        )
        raise DataError(
            f"data set {dataset} has no {asked}; its columns are {', '.join(names)}: name the one with the text "
            "in text_column"
        )
    return found


def _tokenised_rows(rows: Any, num_samples: int, length: int, rng: random.Random) -> list[dict[str, Any]]:
    if "question" in rows.column_names:
        groups: dict[int, list[int]] = {}
        for index, question in enumerate(rows["question"]):
            groups.setdefault(int(question), []).append(index)
        shuffled = rng.sample(list(groups.values()), len(groups))
        indices: list[int] = []
        for group in shuffled:
            if indices and len(indices) + len(group) > num_samples:
                break
            indices.extend(group)
    else:
        indices = rng.sample(range(len(rows)), min(num_samples, len(rows)))
        length_of = {name: length for name in SEQUENCE_COLUMNS}
        return [{name: _cut(value, length_of.get(name)) for name, value in rows[index].items()} for index in indices]
    return [rows[index] for index in indices]


def _cut(value: Any, length: int | None) -> Any:
    return value if length is None else value[:length]


def _text_blocks(
    rows: Any, column: str, dataset: str, tokenizer: Any, num_samples: int, length: int, rng: random.Random
) -> list[dict[str, Any]]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = length - len(bos)
    tokens: list[int] = []
    # Texts follow one another from a random one on, so that lines of one document stay together.
    first = rng.randrange(len(rows))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        indices = [(first + index) % len(rows) for index in range(start, min(start + ROWS_AT_ONCE, len(rows)))]
        texts = [text for text in rows[indices][column] if text]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ():
            tokens += [*ids, *eos]
        if len(tokens) >= POOL * num_samples * size:
            break
    blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    if not blocks:
        raise DataError(
            f"data set {dataset} is too short: {len(tokens)} tokens, and one sample takes {size}; "
            f"give more text, or a max_seq_length of {max(len(tokens), 2)} or less"
        )
    chosen = rng.sample(blocks, min(num_samples, len(blocks)))
    return [{"input_ids": bos + block, "labels": [IGNORED] * len(bos) + block} for block in chosen]


def collated(rows: Sequence[Mapping[str, Any]], collate: PaddingCollator) -> Batch:
    """Return rows of tokens as one batch, with their numeric columns."""
    sequences = [name for name in SEQUENCE_COLUMNS if name in rows[0]]
    batch = collate([{name: row[name] for name in sequences} for row in rows])
    scalars = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    return batch | {name: torch.tensor([row[name] for row in rows]) for name in scalars}


def require_disjoint(selection: Sequence[Batch], reported: Sequence[Batch]) -> None:
    """Refuse to report figures on rows that something was selected on.

    Raises:
        DataError: If a row of tokens, padding aside, is in both.
    """
    seen = set(_rows_of_tokens(selection))
    shared = [row for row in _rows_of_tokens(reported) if row in seen]
    if shared:
        raise DataError(
            f"{len(shared)} of the rows to report on are among those that selection saw, so that the figure would "
            "flatter it; report on another split, or on other rows of it"
        )


def _rows_of_tokens(batches: Sequence[Batch]) -> Iterator[tuple[int, ...]]:
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            yield tuple(ids[mask].tolist())
