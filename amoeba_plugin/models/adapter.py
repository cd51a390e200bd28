"""Which modules of a decoder play which role, and which linears share one channel axis.

An adapter holds names and sizes, never a copied ``forward``. Everything an algorithm needs to know of an architecture
is asked here, so that depth, width, training and extraction never say ``q_proj``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.compressed_linear import CompressedLinear, keep_packed
from amoeba_plugin.models.packed_linear import dense_weight, is_packed, linear_sizes
from amoeba_plugin.models.sublayers import Sublayer


@dataclass(frozen=True)
class ChannelAxis:
    """A run of channels in one module: its path inside the decoder layer, and how many channels one unit takes.

    Projections that a decoder keeps fused in one linear are several axes of the same path.

    Attributes:
        path: Of a linear, or of a norm over the channels.
        channels_per_unit: Neighbouring channels that stay or go together.
        first_channel: Where the run starts; not 0 for the later parts of a fused linear.
        expert: Of a module that keeps the weights of all its experts in parameters of three dimensions, (experts, out,
            in): the expert that the channels belong to.
        parameter: The name of the weight within its module.
    """

    path: str
    channels_per_unit: int
    first_channel: int = 0
    expert: int | None = None
    parameter: str = "weight"

    def channels(self, order: Tensor) -> Tensor:
        """Spread an order of units over their channels: (units,) -> (units * channels_per_unit,), int64.

        >>> ChannelAxis("qkv_proj", 2, first_channel=8).channels(torch.tensor([1, 0]))
        tensor([10, 11,  8,  9])
        """
        within = torch.arange(self.channels_per_unit)
        return self.first_channel + (order[:, None] * self.channels_per_unit + within).flatten()

    def prefix(self, units: int) -> slice:
        """Return the channels of the first units."""
        return slice(self.first_channel, self.first_channel + units * self.channels_per_unit)

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the whole weight that holds the channels, (out, in) for a linear or an expert.

        No copy, except of a linear whose weight is packed: that is unpacked at every call.
        """
        return self.weight_of(layer.get_submodule(self.path))

    def weight_of(self, module: nn.Module) -> Tensor:
        """Return the weight, given the module that holds it."""
        return dense_weight(module) if is_packed(module) else self.part(module.get_parameter(self.parameter))

    def size(self, layer: nn.Module) -> tuple[int, int]:
        """Return the whole weight's (out, in); packed ones are not unpacked for it."""
        module = layer.get_submodule(self.path)
        if is_packed(module):
            into, out = linear_sizes(module)
            return out, into
        rows, columns = self.weight_of(module).shape
        return rows, columns

    def part(self, parameter: Tensor) -> Tensor:
        """Return the expert's part of a tensor in the shape of the whole parameter; that itself for a linear."""
        return parameter if self.expert is None else parameter[self.expert]


@dataclass(frozen=True)
class ChannelGroup:
    """Linears of a decoder layer that share one channel axis; it shrinks in whole units.

    Producers have the channels as output rows, the consumer has them as input columns.

    Example, Llama with 8 query heads and 4 KV heads of 32 channels: one attention unit is a KV group.

    >>> ChannelGroup("attention", 4, (ChannelAxis("self_attn.q_proj", 64), ChannelAxis("self_attn.k_proj", 32),
    ...              ChannelAxis("self_attn.v_proj", 32)), ChannelAxis("self_attn.o_proj", 64)).channels
    256

    Attributes:
        name: The same in every layer, and for all experts of one.
        units: Of the whole model.
        producers: Have the channels as output rows.
        consumer: Has them as input columns.
        norms: Modules between the two that hold one weight per channel and normalise over all of them (OLMo 2's q and
            k norms). A narrow subnet normalises over the channels it keeps: that is what its stock class computes.
    """

    name: str
    units: int
    producers: tuple[ChannelAxis, ...]
    consumer: ChannelAxis
    norms: tuple[ChannelAxis, ...] = ()

    @property
    def channels(self) -> int:
        """Input channels of the consumer."""
        return self.units * self.consumer.channels_per_unit


def group_key(layer: int, group: ChannelGroup) -> str:
    """Return the name under which a layer's group is found in statistics and strategies: "3.attention", "3.mlp.7"."""
    expert = group.consumer.expert
    return f"{layer}.{group.name}" if expert is None else f"{layer}.{group.name}.{expert}"


class ArchitectureAdapter(ABC):
    """Names and sizes of one family of decoders. Subclass it and hand it over by the hook
    ``amoeba_architectures``."""

    model_types: tuple[str, ...]
    #: Fields of the configuration that list one value per layer.
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    #: Where the norm behind the last layer stands in the decoder.
    final_norm: str = "norm"

    @abstractmethod
    def decoder(self, model: nn.Module) -> nn.Module:
        """Return the module whose ``layers`` are the decoder layers."""

    @abstractmethod
    def channel_groups(self, config: PretrainedConfig) -> tuple[ChannelGroup, ...]:
        """Return the groups of one decoder layer at full width; the same for every layer."""

    def sublayers(self, config: PretrainedConfig) -> Mapping[str, Sublayer]:
        """Return what "attention" and "mlp" of a decoder layer are, so that either can go without the other.

        To be overridden where depth may be searched in sublayers.

        Raises:
            ArchitectureError: If the adapter does not say.
        """
        raise ArchitectureError(
            f"the adapter of {config.model_type} does not say what attention and MLP of its layers are "
            f"({type(self).__name__}.sublayers); set granularity: layer in DepthShrinkingModifier"
        )

    @abstractmethod
    def subnet_config(
        self,
        config: PretrainedConfig,
        kept_layers: Sequence[int],
        units: Mapping[str, int],
        biased: frozenset[str] = frozenset(),
    ) -> PretrainedConfig:
        """Return the configuration of a stock class that holds a subnet.

        Args:
            config: The whole model's configuration.
            kept_layers: Indices of the layers kept, ascending.
            units: Units kept per group name, the same in every layer.
            biased: Names of groups whose consumer carries an output bias that the model did not have.

        Raises:
            ArchitectureError: If no stock class can hold it.
        """

    def residual_share(self, config: PretrainedConfig) -> float | None:
        """Return what the output of the MLP's last linear is multiplied by before it is added to the residual stream.

        ``None``, unless it is overridden: it is not added as the linear leaves it (a norm is in between, or experts
        share the work), and removed layers cannot be made up for in it.
        """
        return None

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the decoder layers that are active."""
        layers = self.decoder(model).layers
        if not isinstance(layers, nn.ModuleList):
            raise ArchitectureError(f"the decoder's layers are a {type(layers).__name__}, not a ModuleList")
        return layers

    def set_layers(
        self, model: PreTrainedModel, layers: Sequence[nn.Module], indices: Sequence[int], whole: PretrainedConfig
    ) -> None:
        """Exchange the layer list; the configuration follows, and cache indices of layers that move. No module is
        copied.

        Args:
            model: Changed in place.
            layers: The decoder layers that shall run, in order.
            indices: Their indices in the whole model.
            whole: The whole model's configuration, for the fields that list one value per layer.
        """
        exchanged, before = nn.ModuleList(layers), list(self.layers(model))
        exchanged.training = self.decoder(model).training  # a new module says True, whatever its layers are
        self.decoder(model).layers = exchanged
        for position, layer in enumerate(layers):
            if layer not in before[position : position + 1]:
                self.set_layer_index(layer, position)
        self.set_depth(model.config, indices, whole)

    def set_depth(self, config: PretrainedConfig, indices: Sequence[int], whole: PretrainedConfig) -> None:
        """Write into a configuration how many layers there are, and what it says of each.

        Args:
            config: Changed in place.
            indices: Of the layers, in the whole model.
            whole: The whole model's configuration.
        """
        config.num_hidden_layers = len(indices)
        for name in self.per_layer_fields:
            values = getattr(whole, name, None)
            if values is not None:
                setattr(config, name, [values[index] for index in indices])

    def set_units(self, layer: nn.Module, group: ChannelGroup, units: int) -> None:  # noqa: B027  # most need nothing
        """Tell a decoder layer how many units of a group are active, where its ``forward`` does not see it by itself.

        Most do: they reshape by ``head_dim``. To be overridden where ``forward`` reads sizes from an attribute.
        """

    def set_layer_index(self, layer: nn.Module, position: int) -> None:
        """Tell a decoder layer at which position its keys and values are cached."""
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = position


def linear_names(layers: Iterable[nn.Module]) -> list[str]:
    """Return the names that the linears of decoder layers have within their parents, sorted: ``["down_proj", ...]``."""
    linears = (
        path
        for layer in layers
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) or is_packed(module)
    )
    return sorted({path.rpartition(".")[2] for path in linears})


def copy_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a deep copy, so that no later change of a live model reaches it."""
    return copy.deepcopy(config)


def text_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside wrappers that offer ``get_base_model`` (PEFT's)."""
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def require_alike_layers(config: PretrainedConfig) -> None:
    """Refuse a model whose layers differ in size, or lack attention or MLP: an adapter knows one size for all.

    Raises:
        ArchitectureError: If the configuration has entries for single layers.
    """
    if getattr(config, "is_heterogeneous", False):
        raise ArchitectureError(
            "the model's layers differ (config.per_layer_config): it is a subnet already, and only models whose layers "
            "are alike can be cut; give the model that it was cut from"
        )


def require_usable(model: PreTrainedModel) -> None:
    """Refuse a model that is quantized, unless its linears can be used as they are, packed; see that they stay so.

    Raises:
        ArchitectureError: Naming the quantization found and the order that works; or if layers differ in size.
    """
    require_alike_layers(model.config)
    keep_packed(model)
    modules = dict(model.named_modules())
    method = getattr(model.config, "quantization_config", None)
    scheme = next(
        (
            name
            for name, module in modules.items()
            if hasattr(module, "quantization_scheme") and not isinstance(module, CompressedLinear)
        ),
        None,
    )
    packed = any(is_packed(module) for module in modules.values())
    if scheme is not None or (method is not None and not packed):
        raise ArchitectureError(
            f"the model is already quantized ({'config.quantization_config' if scheme is None else scheme}), and not "
            "packed, as bitsandbytes leaves linears, beside which an adapter can be trained: load the original model, "
            "and put quantization after extraction in the recipe"
        )
