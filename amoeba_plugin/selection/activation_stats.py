"""Statistics of what flows into each channel group's consumer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch, model_inputs
from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.elastic.experts import expert_inputs
from amoeba_plugin.errors import DataError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup, group_key
from amoeba_plugin.runtime.module_calls import evaluating, input_device, onloaded
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import sum_over_ranks

logger = logging.getLogger(__name__)
Hook = Callable[[torch.nn.Module, tuple[Tensor, ...]], None]
VALUES_AT_ONCE = 2**25  # 256 MiB in fp64; a few such tensors are there together


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
        """Return the statistics of inputs (tokens, channels), any float dtype, in fp64."""
        at_once = max(1, VALUES_AT_ONCE // max(1, inputs.shape[-1]))
        if len(inputs) > at_once:
            return reduce(cls.merge, map(cls.of, inputs.split(at_once)))
        values = inputs.detach().to("cpu" if inputs.device.type == "mps" else inputs.device, torch.float64)
        if not len(values):
            return cls.empty(inputs.shape[-1])
        mean = values.mean(dim=0)
        return cls(len(values), mean.cpu(), (values - mean).square().sum(dim=0).cpu())

    @classmethod
    def empty(cls, channels: int) -> ActivationStats:
        """Return the statistics of no tokens: zeros, which change nothing they are merged with."""
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
    watch = _Watch()
    handles: list[RemovableHandle] = []
    try:
        for index, layer in enumerate(adapter.layers(model)):
            hooks: dict[str, list[Hook]] = {}  # by module; experts are many groups of one
            for group in adapter.channel_groups(model.config):
                hooks.setdefault(group.consumer.path, []).append(watch.hook(group_key(index, group), group))
            for path, some in hooks.items():
                handles.append(layer.get_submodule(path).register_forward_pre_hook(_together(some)))
        with evaluating(model):
            for batch in StageBar(
                batches, desc="activation statistics", unit="batch", disable=not progress, shorter=LESS_DATA
            ):
                watch.begin(batch)
                adapter.decoder(model)(**model_inputs(batch, input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    seen = {key: stats.over_ranks() for key, stats in watch.seen.items()}
    tell_idle(seen)
    return seen


@dataclass
class _Watch:
    """Gathers, over the batches a model runs on, what its hooks see of every group; fails at what is not finite."""

    seen: dict[str, ActivationStats] = field(default_factory=dict)
    number: int = -1  # of the running batch
    present: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # (batch, positions)

    def begin(self, batch: Batch) -> None:
        self.number, self.present = self.number + 1, batch["attention_mask"].bool()

    def hook(self, key: str, group: ChannelGroup) -> Hook:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = self.present.flatten().to(args[0].device)
            if group.consumer.expert is None:
                tokens = args[0].flatten(0, -2)[rows]  # OPT calls its MLP with batch and positions as one axis
            else:
                tokens = expert_inputs(group, module, args, rows)
            stats = ActivationStats.of(tokens)
            require_finite(stats.sum_squared_deviation, key, self.number)
            self.seen[key] = self.seen[key].merge(stats) if key in self.seen else stats

        return hook


def require_finite(sums: Tensor, key: str, batch: int) -> None:
    """Refuse sums over what flowed into a group's linear that are not finite.

    Raises:
        DataError: With the group and the batch.
    """
    if not bool(torch.isfinite(sums).all()):
        raise DataError(
            f"activations of {key} are NaN or infinite on calibration batch {batch}; check the "
            "weights, load them in bfloat16 or float32 instead of float16, and look at that batch"
        )


def _together(hooks: Sequence[Hook]) -> Hook:
    """Make one hook of those of one module; what looks at its weights finds them there, offloaded or not."""
    if len(hooks) == 1:
        return hooks[0]

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        with onloaded([module]):
            for each in hooks:
                each(module, args)

    return hook


def tell_idle(seen: Mapping[str, ActivationStats]) -> None:
    """Warn of experts that no token reached."""
    idle = [key for key, stats in seen.items() if not stats.tokens]
    if idle:
        logger.warning(
            "no calibration token reached %d of %d experts (%s, ...), whose neurons keep the order they have; "
            "give more calibration data",
            len(idle),
            sum(key.count(".") == 2 for key in seen),
            idle[0],
        )
