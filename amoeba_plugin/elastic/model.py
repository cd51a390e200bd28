"""ElasticModel: a model of which exactly one subnet shape is active; switching copies no parameter.

Channels are reordered once by importance (which changes no output), so every width is a prefix of every weight:
``ElasticLinear`` computes with views ``weight[:out, :in]``, of a fused linear with one such view per part. Packed
weights stay as they are, and what flows in and out of them is reordered. Depth is the layer list, exchanged. (The idea
is that of ELMS, arXiv:2409.09071, section 3: permutation-consistent units.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.experts import ElasticExperts
from amoeba_plugin.elastic.group import ElasticGroup
from amoeba_plugin.elastic.held_repairs import as_trained, hold, hold_as_changes
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.elastic.subnet_plan import SubnetPlan
from amoeba_plugin.errors import AmoebaError, ArchitectureError
from amoeba_plugin.models.adapter import copy_config, group_key, require_usable
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.kept import Kept
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.fsdp import gathered
from amoeba_plugin.runtime.module_calls import is_offloaded
from amoeba_plugin.runtime.recomputation import NotOfCopies, recompute_as_run
from amoeba_plugin.runtime.streaming import load_on_use
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.smol.router import ShapeRouter

if TYPE_CHECKING:
    from amoeba_plugin.runtime.streaming import StreamedWeights

Switch = tuple[int, list[tuple[nn.Module, dict[str, Any]]]]


class ElasticModel:
    """Makes a model elastic in place and switches its shape.

    Example::

        elastic = ElasticModel(model, strategy)      # the largest shape is active: outputs are those of before
        with elastic.active("24x7/8"):
            model(**batch)                           # 24 layers at 7/8 of the width

    Args:
        model: A causal LM; its channels are reordered in place. Linears that a quantization keeps packed
            (bitsandbytes' 4-bit and 8-bit, ...) stay as they are: adapters can be trained beside them at every shape,
            but narrow shapes are no faster.
        strategy: Must carry the model's fingerprint.
        weights: Where a model without weights takes them from, part by part; such a model can be evaluated and cut, not
            trained.

    Raises:
        ArtifactError: If the strategy belongs to another model.
        ArchitectureError: If the model is quantized in a form that cannot be used here, already elastic, offloaded by
            accelerate, or of an unsupported architecture.
    """

    def __init__(
        self, model: PreTrainedModel, strategy: SubnetStrategy, weights: StreamedWeights | None = None
    ) -> None:
        require_usable(model)
        _require_at_hand(model)
        self.model = model
        self.strategy = strategy
        self.streamed = weights
        self.adapter = architecture_of(model.config)
        strategy.require_model(model, self.adapter, nullcontext if weights is None else weights.loaded)
        self.config = copy_config(model.config)
        self.plan = SubnetPlan(self.adapter, self.config, strategy)
        self.layers: tuple[nn.Module, ...] = tuple(self.adapter.layers(model))
        self._require_whole_largest()
        self._sublayers = StandIns(self.adapter.sublayers(self.config) if strategy.depth.lost else {}, self.layers)
        self.groups, self.experts = self._elastic_groups(), self._elastic_experts()
        self._listeners: list[Callable[[SubnetShape], None]] = []
        self._switches: dict[SubnetShape, list[Switch]] = {}  # of the groups, once a shape was active
        if weights is None:
            for group in self.groups:
                group.reorder(strategy.width)
            for experts in self.experts:
                experts.reorder(strategy.width.order)
        else:
            load_on_use(model, self.layers, self.loaded)
        hold(strategy.repairs, self.groups, self.experts, model.dtype)
        self._shape = self.space.largest
        decoder = self.adapter.decoder(model)
        self._hook = decoder.register_forward_pre_hook(partial(recompute_as_run, NotOfCopies(self.held)))

    @property
    def packed(self) -> bool:
        """Whether linears keep their weights in a quantization's own form: a narrow shape then costs what the whole
        one does."""
        return any(group.packed for group in self.groups)

    @property
    def space(self) -> ShapeSpace:
        """The shapes that can be activated."""
        return self.strategy.space

    @property
    def shape(self) -> SubnetShape:
        """The active shape."""
        return self._shape

    @contextmanager
    def loaded(self, part: nn.Module) -> Iterator[None]:
        """Have the weights of a part of the model in memory, reordered, for a block of code.

        Only a model whose weights are streamed has them anywhere else.
        """
        if self.streamed is None:
            yield
            return
        with self.streamed.loaded(part) as fresh:
            inside = set(part.modules()) if fresh else set()
            groups = [group for group in self.groups if group.consumer in inside]
            for group in groups:
                group.reorder(self.strategy.width, in_place=False)
            for experts in self.experts:
                if experts.module in inside:
                    experts.reorder(self.strategy.width.order)
            yield
            for group in groups:
                group.consumer.compensation = None

    def kept_layers(self, shape: SubnetShape | None = None) -> tuple[int, ...]:
        """Return the indices of the layers of which a shape (default: the active one) keeps anything."""
        return self.plan.kept_layers(shape or self._shape)

    def lost(self, shape: SubnetShape | None = None) -> Mapping[int, str]:
        """Return the sublayer, "attention" or "mlp", that layers kept in part have lost at a shape, by layer index."""
        return self.plan.lost(shape or self._shape)

    def listed(self, shape: SubnetShape | None = None) -> list[Kept]:
        """Return the layers that a shape keeps as they are written: 3, or "3.mlp" where that is all of layer 3."""
        return self.strategy.depth.listed((shape or self._shape).depth)

    def on_shape_change(self, listener: Callable[[SubnetShape], None]) -> None:
        """Call ``listener`` with the active shape, now and after every change (a SMOL router listens here)."""
        self._listeners.append(listener)
        listener(self._shape)

    def set_shape(self, shape: SubnetShape | str) -> None:
        """Activate a shape.

        Raises:
            ShapeError: If the space, or an active adapter's, does not hold it; the active shape stays.
            AdapterError: If an adapter is merged at another shape; the active shape stays.
        """
        before, told = self._shape, []
        self._activate(self.space.require(shape))
        try:
            for listener in self._listeners:
                listener(self._shape)
                told.append(listener)
        except AmoebaError:
            self._activate(before)
            for listener in told:
                listener(before)
            raise

    def _activate(self, shape: SubnetShape) -> None:
        self._sublayers.restore()
        if shape not in self._switches:
            self._switches[shape] = [self._switch_of(group, shape) for group in self.groups]
        for group, (units, written) in zip(self.groups, self._switches[shape], strict=True):
            for module, values in written:
                vars(module).update(values)
            self.adapter.set_units(group.layer, group.group, units)
        for experts in self.experts:
            experts.set_units(self.strategy.width.units[shape.width], experts.repaired_at(shape))
        self._sublayers.set(self.lost(shape))  # before the layers are numbered: stand-ins count their layer's tokens
        kept = self.kept_layers(shape)
        self.adapter.set_layers(self.model, [self.layers[index] for index in kept], kept, self.config)
        self._shape = shape

    def _switch_of(self, group: ElasticGroup, shape: SubnetShape) -> Switch:
        """Return the units of a group at a shape, and what is written for it."""
        units = self.plan.units(shape.width, group.key, group.group)
        row = None if shape.width == 1 else self.space.widths.index(shape.width)
        return units, group.active_fields(units, row, group.repaired_at(shape))

    @contextmanager
    def whole_layers(self) -> Iterator[None]:
        """Put the sublayers that the active shape lacks back for a block of code, say to look at their weights."""
        self._sublayers.restore()
        try:
            yield
        finally:
            self._sublayers.set(self.lost())

    def set_units(self, units: Mapping[str, int], repaired: Mapping[str, Tensor] | None = None) -> None:
        """Give every layer the same number of units per group name until the next :meth:`set_shape`.

        Biases that stand in for missing channels, and repaired weights, stay those of the active shape.

        Args:
            units: By group name.
            repaired: By group key, weights to compute with, (out, channels of so many units), in place of those.
        """
        for index in range(len(self.layers)):
            keyed = {group_key(index, group): units[group.name] for group in self.adapter.channel_groups(self.config)}
            self.set_layer_units(index, keyed, repaired)

    def set_layer_units(
        self, layer: int, units: Mapping[str, int], repaired: Mapping[str, Tensor] | None = None
    ) -> None:
        """Do for one layer what :meth:`set_units` does; ``units`` are by group key."""
        for group in self.groups:
            if group.layer is self.layers[layer]:
                held = group.consumer.repaired if repaired is None else group.try_repaired(repaired.get(group.key))
                group.set_units(units[group.key], group.consumer.compensation_row, held)
                self.adapter.set_units(group.layer, group.group, units[group.key])
        for experts in self.experts:
            if experts.layer is self.layers[layer]:
                held = experts.active_repaired if repaired is None else experts.try_repaired(repaired)
                experts.set_units(units, held)

    @contextmanager
    def active(self, shape: SubnetShape | str) -> Iterator[PreTrainedModel]:
        """Activate a shape for a block of code; the one active before comes back, after an exception too."""
        before = self._shape
        self.set_shape(shape)
        try:
            yield self.model
        finally:
            self.set_shape(before)

    def held(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what brings the shape of now back, for layers that are recomputed in a backward pass."""
        return partial(self._recomputing, self._shape)

    @contextmanager
    def _recomputing(self, shape: SubnetShape) -> Iterator[None]:
        if shape == self._shape:
            yield
            return
        routers = [module for module in self.model.children() if isinstance(module, ShapeRouter)]
        with routers[0].pinned() if routers else nullcontext(), self.active(shape):  # a router has a hold of its own
            yield

    def reordered_strategy(self) -> SubnetStrategy:
        """Return the strategy for the model as it is now, its channels in order of importance; it changes no order.

        Raises:
            ArchitectureError: If missing channels are compensated: the biases were made from the weights of before. Or
                if weights are packed, which nobody can have trained.
        """
        width = self.strategy.width
        if self.packed:
            raise ArchitectureError(
                "the model's weights are quantized and cannot be trained; put an adapter on it (adapter: {type: smol} "
                "or {type: lora}), or load it in full precision"
            )
        if width.bias_compensation:
            raise ArchitectureError(
                "a model whose own weights were trained has no biases that stand in for its missing channels; select "
                "with bias_compensation: false, or train an adapter"
            )
        order = {key: torch.arange(len(value)) for key, value in width.order.items()}
        means = {
            group.key: group.reordered(width.mean_input[group.key], width.order[group.key])
            for group in self.groups
            if group.key in width.mean_input and group.key in width.order
        }
        with self.active(self.space.largest) as model:
            fingerprint = model_fingerprint(model, self.adapter, gathered)
            repairs = as_trained(self.strategy.repairs, self.groups, self.experts, gathered)
        width = replace(width, order=order, mean_input=means)
        return replace(self.strategy, width=width, fingerprint=fingerprint, repairs=repairs)

    def share_repairs(self) -> None:
        """Let shapes whose linears are repaired train the shared weights, where those require gradients."""
        hold_as_changes(self.groups, self.experts)

    def release(self, original_order: bool = False) -> None:
        """Give the whole model back with its host's linears; its channels stay reordered, which changes no output.

        Those of packed linears never were, so that what is dense beside them goes back.

        Args:
            original_order: Put all channels back to where they were.
        """
        self.set_shape(self.space.largest)
        self._hook.remove()
        self._listeners.clear()
        for group in self.groups:
            order = self.strategy.width.order.get(group.key)
            if order is not None and (group.packed or original_order):
                group.permute(order.argsort())
            group.restore()
        for experts in self.experts:
            if original_order:
                experts.reorder({key: order.argsort() for key, order in self.strategy.width.order.items()})
            experts.restore()

    def _elastic_groups(self) -> tuple[ElasticGroup, ...]:
        groups = self.adapter.channel_groups(self.config)
        return tuple(
            ElasticGroup.convert(group_key(index, group), group, layer)
            for index, layer in enumerate(self.layers)
            for group in groups
            if group.consumer.expert is None
        )

    def _elastic_experts(self) -> tuple[ElasticExperts, ...]:
        groups = [group for group in self.adapter.channel_groups(self.config) if group.consumer.expert is not None]
        if groups and self.strategy.width.bias_compensation:
            raise ArchitectureError(
                f"bias compensation on {self.config.model_type}: the experts' weights have no biases beside them; set "
                "bias_compensation: false in WidthShrinkingModifier"
            )
        if not groups:
            return ()
        return tuple(
            ElasticExperts.convert(layer, {group_key(index, group): group for group in groups})
            for index, layer in enumerate(self.layers)
        )

    def _require_whole_largest(self) -> None:
        if self.space.largest != SubnetShape(len(self.layers), Fraction(1)):
            raise ArchitectureError(
                f"the space's largest shape {self.space.largest} is not the whole model ({len(self.layers)}x1); "
                "the largest subnet is the teacher of all others: add depth and width 1 to the strategy"
            )


def _require_at_hand(model: PreTrainedModel) -> None:
    if is_offloaded(model):
        raise ArchitectureError(
            "accelerate offloads weights of this model: they would be fetched in the order they had, whatever is done "
            "to them here. Selection runs on it; to train or cut, load the model where memory holds it whole, without "
            "offloading. `amoeba extract` needs memory for the subnet alone"
        )
