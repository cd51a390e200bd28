"""What a strategy makes of a model's configuration, before any weights are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from transformers import PretrainedConfig

from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup, group_key
from amoeba_plugin.shape import ShapeSpace, SubnetShape


@dataclass(frozen=True)
class SubnetPlan:
    """Answers what an elastic model answers about its shapes, for a model that is not loaded.

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
