"""One shape of an elastic model, as an ordinary transformers model that knows nothing of this package.

What is active of every weight is copied, the adapter is folded in, and the result is built as the stock class that can
hold it. Every parameter is checked against the size the class expects, so a cut that silently did nothing is an error.

Layers of different sizes (``allocation: global``), or without attention or MLP (``granularity: sublayer``), become a
class of ``modeling_per_layer.py``, which travels with the checkpoint, or, ``portable``, a stock class of the largest
layer's sizes with zeros in the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.elastic.linear import PackedElasticLinear
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.subnet_config import build
from amoeba_plugin.errors import ArchitectureError, ArtifactError
from amoeba_plugin.extraction.audit import require_sizes
from amoeba_plugin.models.finite import is_finite
from amoeba_plugin.models.packed_linear import dense_weight, is_packed
from amoeba_plugin.models.partial_linear import PartialLinear
from amoeba_plugin.models.slices import active_parameters, take
from amoeba_plugin.runtime.generation_defaults import keep_generation_defaults
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol import SmolModel
from amoeba_plugin.smol.export import LoraPair

logger = logging.getLogger(__name__)


def extract(elastic: ElasticModel, shape: SubnetShape | str, portable: bool = False) -> PreTrainedModel:
    """Return a subnet as a model of its own; the elastic model and its active shape are left as they were.

    Args:
        elastic: With or without an adapter on it; active adapters are folded in at this shape.
        shape: A shape of its space.
        portable: Pad layers of different sizes with zeros to the largest of them, and give those that lack attention
            or MLP one that ends in zeros, for a stock class: the same outputs, loaded anywhere, but neither smaller nor
            faster than the padded size. Changes nothing where all layers are alike.

    Returns:
        A model in evaluation mode, on the elastic model's device, sharing no memory with it; of a stock class, or of a
        per-layer class where layers differ and ``portable`` is not set.

    Raises:
        ShapeError: If the space does not hold the shape.
        ArchitectureError: If no class can hold it, or a tensor did not get the size that was asked for.
        ArtifactError: If a weight of it is NaN or infinite.
    """
    shape = elastic.space.require(shape)
    sizes = elastic.plan.sizes(shape)
    held = sizes.padded if portable else sizes
    with elastic.active(shape), torch.no_grad():
        subnet = _empty_model(elastic.plan.configured(held), elastic.model)
        with elastic.whole_layers() if portable else nullcontext():
            if portable:
                elastic.set_units(held.largest)
            _fill_layers(subnet, elastic)
        _fill_rest(subnet, elastic)
        if portable:
            _clear_padding(subnet, elastic, sizes)
            _clear_lost(subnet, elastic, sizes)
    require_sizes(elastic.adapter.layers(subnet), elastic.adapter, elastic.config, held)
    if type(subnet) is not type(elastic.model):
        logger.info("subnet %s is a %s, which computes the same and holds it", shape, type(subnet).__name__)
    subnet.tie_weights()
    subnet.generation_config = elastic.model.generation_config
    keep_generation_defaults(subnet)
    subnet.eval()
    return subnet


def cut_factors(elastic: ElasticModel, adapter: SmolModel, shape: SubnetShape | str) -> dict[str, LoraPair]:
    """Return the adapter at a shape as the LoRA of the subnet that is cut without it.

    Args:
        elastic: With ``adapter`` on it, whose router follows the shape.
        adapter: The SMOL adapter; its (first) active one is taken.
        shape: A shape of the space.

    Returns:
        By module name in the subnet (layers renumbered): A (rank, active_in) and B (active_out, rank), in the elastic
        model's order of channels.

    Raises:
        ShapeError: If the space does not hold the shape.
    """
    with elastic.active(shape) as model:
        return {name: _cut_pair(pair, model.get_submodule(name)) for name, pair in adapter.lora_factors().items()}


def _cut_pair(pair: LoraPair, layer: nn.Module) -> LoraPair:
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if not isinstance(base, PartialLinear):
        return pair
    return pair._replace(A=pair.A[:, : base.active_in], B=take(pair.B, base.active_rows))


def become(model: PreTrainedModel, subnet: PreTrainedModel) -> None:
    """Turn ``model`` into ``subnet`` in place: whoever holds the object holds the subnet from now on.

    A host's override of ``save_pretrained`` on the instance (llm-compressor's) is kept.
    """
    override = model.__dict__.get("save_pretrained")
    model.__class__ = type(subnet)
    model.__dict__ = subnet.__dict__
    if override is not None:
        model.__dict__["save_pretrained"] = override


def cut_linear(linear: Any, delta: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear at its active size.

    Args:
        linear: A :class:`PartialLinear` (cut to what is active of it), or another one, taken whole. Packed weights are
            unpacked.
        delta: What an adapter adds to the whole weight, same shape as it; added in fp32.

    Returns:
        (active_out, active_in) and (active_out,) or ``None``; copies.
    """
    whole, bias = _dense(linear)
    weight = whole
    if isinstance(linear, PartialLinear):
        rows, columns = linear.active_rows, linear.active_in
        weight, bias = take(whole, rows)[:, :columns], None if bias is None else take(bias, rows)
        delta = None if delta is None else take(delta, rows)[:, :columns]
        if linear.repaired is not None:
            repaired = linear.repaired_weight(lambda: whole).detach()
            # padded to another layer's size it is narrower than what is active
            weight = functional.pad(repaired, (0, columns - repaired.shape[1]))
        if linear.compensation is not None and linear.compensation_row is not None:
            row = take(linear.compensation[linear.compensation_row], rows)
            bias = row if bias is None else bias + row
    if delta is None:
        weight = weight.clone(memory_format=torch.contiguous_format)
    else:
        weight = (weight.float() + delta.float()).to(weight.dtype)
    return weight, None if bias is None else bias.clone()


def _dense(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Return a linear's own weight and bias, detached, or, of a packed one, unpacked and ordered copies."""
    bias = getattr(linear, "bias", None)
    bias = None if bias is None else bias.detach()
    if not is_packed(linear):
        return linear.weight.detach(), bias
    if isinstance(linear, PackedElasticLinear):
        weight, bias = linear.whole_weight(), None if bias is None else bias[linear.row_order]
    else:
        weight = dense_weight(linear)
    return weight, None if bias is None else bias.to(weight.dtype)


def _empty_model(config: PretrainedConfig, like: PreTrainedModel) -> PreTrainedModel:
    # Buffers (rotary frequencies) are not in a checkpoint: they must be real.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = build(config, dtype=like.dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(like.device)
    return model


def _fill_layers(subnet: PreTrainedModel, elastic: ElasticModel) -> None:
    pairs = list(zip(elastic.adapter.layers(subnet), elastic.adapter.layers(elastic.model), strict=True))
    indices = elastic.kept_layers()
    for position, (target, source) in enumerate(tqdm(pairs, desc="extraction", unit="layer", leave=False)):
        with elastic.loaded(source):
            for path, module in _parameterised(target):
                _fill(module, source.get_submodule(path), f"layer {indices[position]}, {path}")


def _fill_rest(subnet: PreTrainedModel, elastic: ElasticModel) -> None:
    layers = set(elastic.adapter.layers(subnet).modules())
    tied = None
    if subnet.config.tie_word_embeddings:
        tied = subnet.get_output_embeddings()
        _require_still_tied(elastic.model)
    for path, module in _parameterised(subnet):
        if module not in layers and module is not tied:
            source = elastic.model.get_submodule(path)
            with elastic.loaded(source):
                _fill(module, source, path)


def _require_still_tied(model: PreTrainedModel) -> None:
    """Refuse an adapter on one of two modules that share a weight: folded in, it would change the other one too."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) and not module.disable_adapters:
            raise ArchitectureError(
                "the adapter changes the output embeddings apart from the input embeddings, but this model ties them "
                "to one weight; extract with the adapter separate, or train without lm_head and embed_tokens as targets"
            )


def _clear_padding(subnet: PreTrainedModel, elastic: ElasticModel, sizes: LayerSizes) -> None:
    """Zero every channel beyond a layer's own units: it is then zero in all activations, quantized or not."""
    for layer, units in zip(elastic.adapter.layers(subnet), sizes.units, strict=True):
        for group in elastic.adapter.channel_groups(subnet.config):
            if units[group.name] == group.units:
                continue
            if group.norms:
                raise ArchitectureError(
                    f"{elastic.config.model_type}: padding with zeros would change the norms over {group.name}'s "
                    "channels; extract without portable, or select with allocation: uniform"
                )
            for axis in group.producers:
                gone = slice(axis.prefix(units[group.name]).stop, axis.prefix(group.units).stop)
                axis.weight(layer)[gone] = 0
                bias = layer.get_submodule(axis.path)._parameters.get("bias")
                if bias is not None:
                    bias[gone] = 0
            group.consumer.weight(layer)[:, group.consumer.prefix(units[group.name]).stop :] = 0


def _clear_lost(subnet: PreTrainedModel, elastic: ElasticModel, sizes: LayerSizes) -> None:
    """Let a sublayer that a stock class has and the subnet has not end in zeros."""
    for position, part in sizes.lost.items():
        parameters = dict(elastic.adapter.layers(subnet)[position].named_parameters())
        for name in elastic.adapter.sublayers(elastic.config)[part].outputs:
            if name in parameters:
                parameters[name].zero_()


def _parameterised(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in root.named_modules() if module._parameters)


def _fill(target: nn.Module, source: nn.Module, where: str) -> None:
    """Give a parameter-less module of the stock class the tensors of its counterpart, sizes checked."""
    delta = None
    if isinstance(source, ModulesToSaveWrapper):
        trained = source.modules_to_save[source.active_adapters[0]]
        source = source.original_module if source.disable_adapters else trained
    if isinstance(source, BaseTunerLayer):
        delta = _adapter_delta(source)
        source = source.get_base_layer()
    if isinstance(source, nn.Linear) or is_packed(source):
        weight, bias = cut_linear(source, delta)
        if is_packed(source):
            dtype = target.get_parameter("weight").dtype
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        tensors = {"weight": weight, "bias": bias}
    else:
        tensors = {name: parameter.clone() for name, parameter in active_parameters(source).items()}
        if delta is not None:  # on embeddings
            whole = source.get_parameter("weight")
            tensors["weight"] = (whole.float() + delta.float()).to(whole.dtype)
    for name, expected in target._parameters.items():
        if expected is None:
            if tensors.get(name) is not None:
                raise ArchitectureError(f"{where}: the class of the subnet has no place for '{name}'")
            continue
        tensor = tensors.get(name)
        if tensor is None and name == "bias":  # the carrier has one switch for several biases: a zero changes nothing
            tensor = torch.zeros(expected.shape, dtype=weight.dtype, device=weight.device)
        if tensor is not None and not is_finite(tensor):
            raise ArtifactError(
                f"{where}.{name} is NaN or infinite somewhere, in the base model or by its adapter; copy the base "
                "model anew, repeat the training, or extract in a dtype that holds its numbers"
            )
        if tensor is None or tensor.shape != expected.shape:
            raise ArchitectureError(
                f"{where}.{name}: asked for {tuple(expected.shape)}, got "
                f"{None if tensor is None else tuple(tensor.shape)}; the architecture adapter's channel groups do not "
                "describe this model"
            )
        setattr(target, name, nn.Parameter(tensor.contiguous()))


def _adapter_delta(layer: BaseTunerLayer) -> Tensor | None:
    if layer.merged or layer.disable_adapters:
        return None
    # Every LoRA-like layer of PEFT has it, though the base class does not name it.
    delta_of = getattr(layer, "get_delta_weight", None)
    if delta_of is None:
        raise ArchitectureError(
            f"the adapter has a {type(layer).__name__}, whose change of a weight cannot be added to it; extract with "
            "SMOL or LoRA, or merge the adapter into the base model before it is made elastic"
        )
    for name in layer.active_adapters:
        if getattr(layer, "use_dora", {}).get(name) or getattr(layer, "lora_bias", {}).get(name):
            raise ArchitectureError(
                f"the adapter '{name}' is a LoRA with use_dora or lora_bias, which is more than a sum of weights; take "
                "one without, or merge it into the base model before it is made elastic"
            )
    deltas = [delta_of(name) for name in layer.active_adapters]
    return deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(0) if deltas else None
