"""Second moments of what flows into the linears that read channels: what a least-squares repair knows of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.experts import expert_inputs
from amoeba_plugin.models.adapter import ChannelGroup
from amoeba_plugin.runtime.dtypes import products_of
from amoeba_plugin.runtime.ranks import gather, sum_over_ranks
from amoeba_plugin.runtime.state_store import StateStore
from amoeba_plugin.selection.activation_stats import ActivationStats, require_finite

GRAM_BLOCK = 256  # columns; fewer, and the products are too small to be fast
HELD_OUT = 8  # one of so many rows chooses a ridge


@dataclass
class Moments:
    """``E[x x^T]`` of the inputs of one linear, of rows that repair and of rows that are held out; and each channel's
    own statistics.

    Attributes:
        seen: (channels, channels) fp64, sum over tokens; where the inputs are.
        held_out: The same of other tokens.
        stats: Of all of them, where they are wanted; else of none.
    """

    seen: Tensor
    held_out: Tensor
    stats: ActivationStats

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Return the moments of no tokens."""
        seen, held_out = (torch.zeros(channels, channels, dtype=torch.float64) for _ in range(2))
        return cls(seen, held_out, ActivationStats.empty(channels))

    def add(self, inputs: Tensor, held_out: bool, stats: bool = True) -> None:
        """Count inputs (tokens, channels), any float dtype; multiplied in fp32, summed in fp64.

        Args:
            inputs: To be counted.
            held_out: Whether they are.
            stats: Whether statistics of each channel are wanted.
        """
        rows = inputs.detach().float()
        where = rows.device if rows.device.type != "mps" else torch.device("cpu")  # which has no fp64
        self.seen, self.held_out = self.seen.to(where), self.held_out.to(where)
        with products_of(inputs.dtype):
            gram = gram_of(rows)
        (self.held_out if held_out else self.seen).add_(gram.to(where, torch.float64))
        if stats:
            self.stats = self.stats.merge(ActivationStats.of(inputs))

    def over_ranks(self) -> Moments:
        """Return the moments of the tokens of all ranks together."""
        seen, held_out = (sum_over_ranks(each.cpu()).to(each.device) for each in (self.seen, self.held_out))
        return Moments(seen, held_out, self.stats.over_ranks())

    def ordered(self, channels: Tensor) -> Moments:
        """Return them with the channels in another order, (channels,) int64; statistics stay as they are."""
        order = channels.to(self.seen.device)
        seen, held_out = (each[order[:, None], order] for each in (self.seen, self.held_out))
        return Moments(seen, held_out, self.stats)

    def joined(self, every: bool = True) -> Moments:
        """Return them with no rows held out: of every row, or of those that are seen."""
        return Moments(
            self.all if every else self.seen, torch.zeros(1, 1, dtype=self.seen.dtype).expand_as(self.seen), self.stats
        )

    @property
    def all(self) -> Tensor:
        """(channels, channels), of all rows."""
        return self.seen + self.held_out


def gram_of(rows: Tensor) -> Tensor:
    """Return ``X^T X``, its lower half computed alone: blocks of columns by those up to them."""
    gram = rows.new_empty(rows.shape[1], rows.shape[1])
    for block in torch.arange(rows.shape[1]).split(GRAM_BLOCK):
        start, stop = int(block[0]), int(block[-1]) + 1
        gram[start:stop, :stop] = rows[:, start:stop].mT @ rows[:, :stop]
        gram[:start, start:stop] = gram[start:stop, :start].mT
    return gram


@dataclass
class ChannelMoments:
    """The moments of all groups of a model, held in fp32 within a budget of memory, and beyond it in files.

    Attributes:
        store: Where they are.
        stats: Of every channel, by group key.
    """

    store: StateStore
    stats: dict[str, ActivationStats] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def of(cls, budget: float) -> Iterator[ChannelMoments]:
        """Yield a place for moments, of so many bytes of memory; its files vanish with the block."""
        with StateStore.of(budget) as store:
            yield cls(store)

    def __setitem__(self, key: str, moments: Moments) -> None:
        self.store[key] = torch.stack([moments.seen.float(), moments.held_out.float()])
        self.stats[key] = moments.stats

    def __getitem__(self, key: str) -> Moments:
        seen, held_out = self.store[key].double()
        return Moments(seen, held_out, self.stats[key])

    def __contains__(self, key: str) -> bool:
        return key in self.stats


def held_out_count(rows: int, least: int = 0) -> int:
    """Return how many of some rows are held out: an eighth, or ``least``, but that no more than half.

    >>> held_out_count(512, 8), held_out_count(20, 8), held_out_count(6, 8), held_out_count(20)
    (64, 8, 3, 3)
    """
    return max(-(-rows // HELD_OUT), min(least, rows // 2))


def held_out_rows(batches: Sequence[Batch], least: int = 0) -> list[Tensor]:
    """Return for each batch which of its rows are held out, (rows,) bool: of those of all ranks so many as
    :func:`held_out_count` says.

    Which ones depends on their tokens alone, so that data in another order, or cut into other batches, says the same.
    Of fewer than two rows none is.
    """
    digests = [[_digest(*row) for row in zip(*_tokens(batch), strict=True)] for batch in batches]
    # ranks may have been given the same rows
    every = gather(torch.tensor([digest for batch in digests for digest in batch], dtype=torch.int64)).unique()
    if len(every) < 2:
        return [torch.zeros(len(batch), dtype=torch.bool) for batch in digests]
    last = every[held_out_count(len(every), least) - 1]  # in ascending order
    return [torch.tensor(batch, dtype=torch.int64) <= last for batch in digests]


def _tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()


def _digest(tokens: Tensor, present: Tensor) -> int:
    return int.from_bytes(hashlib.sha256(tokens[present].numpy().tobytes()).digest()[:8], "big", signed=True)


@contextmanager
def watched(
    layer: nn.Module,
    groups: Mapping[str, ChannelGroup],
    batches: Sequence[Batch],
    held_out: Sequence[Tensor],
    stats: bool = True,
) -> Iterator[tuple[dict[str, Moments], Callable[[int], None]]]:
    """Gather, in a block, the moments of what flows into the consumers of one layer.

    Args:
        layer: A decoder layer; its channels may be in any order.
        groups: Of it, by key.
        batches: What will run through it; padded tokens do not count.
        held_out: Rows of every batch, from :func:`held_out_rows`.
        stats: Whether statistics of each channel are wanted.

    Yields:
        By key the moments, which the block fills; and what has to be told the number of every batch before it runs.

    Raises:
        DataError: In the block, if an input is NaN or infinite.
    """
    moments = {key: Moments.empty(group.channels) for key, group in groups.items()}
    running: list[int] = [0]

    def look(key: str, group: ChannelGroup, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        present, held = batches[running[0]]["attention_mask"].bool(), held_out[running[0]][:, None]
        for apart in (False, True):
            some = (present & (held if apart else ~held).to(present.device)).flatten().to(args[0].device)
            if not bool(some.any()):
                continue
            if group.consumer.expert is None:
                rows = args[0].flatten(0, -2)[some]  # OPT calls its MLP with batch and positions as one axis
            else:
                rows = expert_inputs(group, module, args, some)
            moments[key].add(rows, apart, stats)
        require_finite(moments[key].seen.diagonal() + moments[key].held_out.diagonal(), key, running[0])

    handles = [
        layer.get_submodule(group.consumer.path).register_forward_pre_hook(partial(look, key, group))
        for key, group in groups.items()
    ]
    try:
        yield moments, partial(running.__setitem__, 0)
    finally:
        for handle in handles:
            handle.remove()
