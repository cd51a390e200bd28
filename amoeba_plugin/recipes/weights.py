"""How many weights what a recipe makes will have, by the model's configuration alone.

Layers are taken to keep the same share; what a selection finds is about as large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.deployment.loads import uniform_sizes
from amoeba_plugin.elastic.subnet_config import config_for, weightless
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup, linear_names
from amoeba_plugin.modifiers.one_for_all_fields import AdapterOptions
from amoeba_plugin.modifiers.selection import NO_REPAIR
from amoeba_plugin.recipes.budgeted import expected_shapes
from amoeba_plugin.recipes.plan import RecipePlan
from amoeba_plugin.selection.repair.depth import removed_runs
from amoeba_plugin.shape import SubnetShape, parse_width

SIZE_TEXT = 32  # bytes of a line that says how many units a group keeps


@dataclass(frozen=True)
class Weights:
    """Counts of a recipe's model.

    Attributes:
        plan: The recipe.
        config: The whole model's.
        adapter: Of its architecture.
    """

    plan: RecipePlan
    config: PretrainedConfig
    adapter: ArchitectureAdapter

    @cached_property
    def whole(self) -> int:
        """Of the whole model."""
        return sum(each.numel() for each in self._model.parameters())

    @cached_property
    def outside(self) -> int:
        """Of the whole model's embeddings, head and last norm."""
        return self.whole - _count(self.adapter.layers(self._model))

    @cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Of one layer."""
        return self.adapter.channel_groups(self.config)

    @cached_property
    def shapes(self) -> tuple[SubnetShape, ...]:
        """That the recipe makes."""
        return tuple(expected_shapes(self.plan, self.config))

    @property
    def repaired(self) -> int:
        """Of all repaired weights, at most: as if no two removed layers were neighbours, which have one fold."""
        width, layers = self.plan.width, self.config.num_hidden_layers
        folded = self._folds * self._consumers("mlp")
        if width is None:
            return folded
        # a total is a width of its own, at most the whole one
        shares = sum(float(share) for each in width.widths if (share := parse_width(each)) != 1) + len(width.totals)
        by_width = 0 if width.repair == NO_REPAIR else layers * self._consumers()
        return round(folded + shares * (folded + by_width))

    @property
    def order_bytes(self) -> int:
        """Bytes of the orders of importance, of the means of channels, and of the sizes of widths, which are text."""
        width, layers = self.plan.width, self.config.num_hidden_layers
        if width is None:
            return 0
        text = SIZE_TEXT * (len(width.widths) + len(width.totals))
        found: int = layers * sum(8 * group.units + 4 * group.channels + text for group in self.groups)
        return found

    @property
    def neurons(self) -> int:
        """The most channels that one linear reads."""
        return max(group.channels for group in self.groups)

    @property
    def moments(self) -> int:
        """Of the second moments of every linear that reads channels."""
        layers: int = self.config.num_hidden_layers
        return layers * sum(group.channels**2 for group in self.groups)

    def of_shapes(self, shapes: Iterable[SubnetShape], round_to: int | Mapping[str, int] = 1) -> dict[SubnetShape, int]:
        """Return the weights of shapes."""
        asked, layers = list(shapes), dict[Fraction, int]()
        for width in {shape.width for shape in asked}:
            sizes = uniform_sizes(self.adapter, self.config, SubnetShape(1, width), round_to)
            one = weightless(config_for(self.adapter, self.config, sizes))
            layers[width] = _count(self.adapter.layers(one))
        return {shape: self.outside + round(shape.depth * layers[shape.width]) for shape in asked}

    def of_adapter(self, options: AdapterOptions) -> int:
        """Return the weights of the LoRAs of an adapter."""
        layers = self.adapter.layers(self._model)
        targets = options.target_modules or linear_names(layers)
        ranks = options.r * (options.num_experts if options.type == "smol" else 1)
        return sum(
            ranks * (module.in_features + module.out_features)
            for path, module in layers.named_modules()
            if isinstance(module, nn.Linear) and any(f".{path}".endswith(f".{name}") for name in targets)
        )

    @cached_property
    def _folds(self) -> int:
        """How many weights depths have in front of what they remove, at most."""
        depth, layers = self.plan.depth, self.config.num_hidden_layers
        if depth is None or depth.repair == NO_REPAIR or self.adapter.residual_share(self.config) is None:
            return 0
        if depth.kept_layers is not None:
            whole = [each for each in depth.kept_layers.values() if all(isinstance(index, int) for index in each)]
            return sum(len(removed_runs(tuple(map(int, each)), layers)) for each in whole)
        return sum(min(layers - depth, depth) for depth in {int(shape.depth) for shape in self.shapes})

    def _consumers(self, name: str = "") -> int:
        """Return the weights of one layer's linears that read channels, or of those of one name."""
        layer = self.adapter.layers(self._model)[0]
        sizes = [group.consumer.size(layer) for group in self.groups if name in ("", group.name)]
        return sum(out * into for out, into in sizes)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return weightless(self.config)


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
