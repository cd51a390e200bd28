"""What a strategy makes of a model: the sizes and the configuration of every shape, with or without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from transformers import PretrainedConfig

from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.elastic.subnet_config import config_for
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup, group_key
from amoeba_plugin.shape import ShapeSpace, SubnetShape


@dataclass(frozen=True)
class SubnetPlan:
    """Answers for every shape of a strategy, from a model's configuration alone.

    Attributes:
        adapter: The model's architecture.
        config: The whole model's.
        strategy: Which layers and channels every shape keeps.
    """

    adapter: ArchitectureAdapter
    config: PretrainedConfig
    strategy: SubnetStrategy

    @property
    def space(self) -> ShapeSpace:
        """The shapes that can be cut."""
        return self.strategy.space

    def kept_layers(self, shape: SubnetShape) -> tuple[int, ...]:
        """Return the indices of the layers of which a shape keeps anything."""
        return self.strategy.depth.kept[shape.depth]

    def lost(self, shape: SubnetShape) -> Mapping[int, str]:
        """Return the sublayer that layers kept in part have lost at a shape, by layer index."""
        return self.strategy.depth.lost.get(shape.depth, {})

    def units(self, width: Fraction, key: str, group: ChannelGroup) -> int:
        """Return how many units of a layer's group a width keeps."""
        return self.strategy.width.units[width].get(key, group.units)

    def sizes(self, shape: SubnetShape) -> LayerSizes:
        """Return what every layer keeps at a shape."""
        groups, kept, lost = self.adapter.channel_groups(self.config), self.kept_layers(shape), self.lost(shape)
        units = [
            {group.name: self.units(shape.width, group_key(index, group), group) for group in groups} for index in kept
        ]
        compensated = self.strategy.width.bias_compensation and shape.width != 1
        return LayerSizes(
            kept,
            units,
            {position: lost[index] for position, index in enumerate(kept) if index in lost},
            frozenset(group.name for group in groups) if compensated else frozenset(),
        )

    def configured(self, sizes: LayerSizes) -> PretrainedConfig:
        """Return the configuration of the class that holds layers of these sizes, as it is saved with a subnet.

        Raises:
            ArchitectureError: If no class can hold them.
        """
        config = config_for(self.adapter, self.config, sizes)
        config.name_or_path = self.config.name_or_path
        vars(config).pop("quantization_config", None)  # what is cut from packed weights is dense
        return config

    def require_fit(self, where: str) -> None:
        """Refuse a strategy that cannot be of this model, by its sizes; weights would tell for sure.

        Args:
            where: Where the strategy is, for people.

        Raises:
            ArtifactError: If layers or channels are others.
        """
        units = self.strategy.width.units[max(self.strategy.width.units)]
        layers, groups = self.config.num_hidden_layers, self.adapter.channel_groups(self.config)
        whole = {group_key(index, group): group.units for index in range(layers) for group in groups}
        if self.strategy.depth.num_layers != layers or (units and dict(units) != whole):
            raise ArtifactError(
                f"the strategy in {where} belongs to another model: its layers or channels are not those of "
                f"{self.config.name_or_path or self.config.model_type}; give --model the one that was selected on"
            )
