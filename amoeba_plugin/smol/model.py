"""SMOL as a PEFT tuner: puts adapters on a model, sets the shape, hands one shape out as a LoRA."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from amoeba_plugin.errors import AdapterError
from amoeba_plugin.models.compressed_linear import keep_packed
from amoeba_plugin.models.kept import Kept
from amoeba_plugin.models.partial_linear import NOT_MERGED, PartialLinear
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol.config import SmolConfig
from amoeba_plugin.smol.export import LoraPair, write_lora
from amoeba_plugin.smol.host import (
    DEFAULT_TARGETS,
    BaseTuner,
    BaseTunerLayer,
    NoMatchingPeftModuleError,
    device_and_dtype,
    get_quantization_kwargs,
    pattern_value,
    resolve_quantization_backend,
)
from amoeba_plugin.smol.layer import SmolLinear
from amoeba_plugin.smol.router import ShapeRouter, SmolLayer
from amoeba_plugin.smol.router_weights import importance_loss

ROUTER_NAME = "shape_router"  # on the root of the base model; must not contain the prefix


class SmolModel(BaseTuner):
    """A model with SMOL adapters; made by ``get_peft_model(model, SmolConfig(...))``.

    >>> peft_model = get_peft_model(model, SmolConfig(depths=[2, 4], widths=["1", "1/2"]))  # doctest: +SKIP
    >>> peft_model.set_shape("2x1/2")  # doctest: +SKIP
    """

    prefix = "smol_"
    tuner_layer_cls = SmolLayer
    target_module_mapping = DEFAULT_TARGETS

    # The shape

    @property
    def router(self) -> ShapeRouter:
        """The router of all adapters.

        Raises:
            AdapterError: If there is none, because all adapters were unloaded.
        """
        router = getattr(self.model, ROUTER_NAME, None)
        if not isinstance(router, ShapeRouter):
            raise AdapterError("the model has no SMOL adapter any more; wrap it with get_peft_model again")
        return router

    @property
    def shape(self) -> SubnetShape:
        """The model's active shape; the largest of the (first) active adapter until :meth:`set_shape` is called."""
        weights = self.router.weights(self._adapter(None))
        return weights.refused or weights.state.shape

    def set_shape(self, shape: SubnetShape | str, kept_layers: Sequence[Kept] | None = None) -> None:
        """Set the model's active shape, for all its adapters, also those that are added, loaded or activated later.

        It routes only: layers and weights are the base model's matter.

        Args:
            shape: A shape of the adapters' space, ``"24x7/8"``.
            kept_layers: The layers that stay; None: each adapter's ``SmolConfig.kept_layers``, or its default.

        Raises:
            ShapeError: If an active adapter was not made for the shape.
            AdapterError: If the adapters are merged at another shape.
        """
        self.router.set_shape(shape, kept_layers)

    @torch.no_grad()
    def routing(self, adapter: str | None = None) -> Tensor:
        """Return the mixture at the active shape, (num_experts,) fp32: weights summing to 1, zero where not chosen.

        Args:
            adapter: Name of the adapter; None: the (first) active one.
        """
        return self._mixture(self._adapter(adapter), deterministic=True)

    def load_balancing_loss(self, adapter: str | None = None) -> Tensor:
        """Return what to add to the loss so that the space's shapes use all experts, () fp32, with a gradient.

        ``router_load_balancing`` times the squared coefficient of variation of the experts' mean weights over all
        shapes, with noise of its own in training; 0 where that field is 0. An expert that no shape chose gets no
        gradient from it but through the noise.

        >>> loss = model(**batch).loss + model.load_balancing_loss()  # doctest: +SKIP

        Args:
            adapter: Name of the adapter; None: the (first) active one.
        """
        name = self._adapter(adapter)
        config, weights = self._config(name), self.router.weights(name)
        if not config.router_load_balancing:
            return torch.zeros((), device=weights.down_weight.device)
        mixtures = []
        for shape in config.space:
            with self.router.at({name: weights.with_noise(weights.state_at(shape))}):
                mixtures.append(self._mixture(name))
        return config.router_load_balancing * importance_loss(torch.stack(mixtures))

    def _mixture(self, name: str, deterministic: bool = False) -> Tensor:
        gates, indices = self.router(name, deterministic)
        mixture: Tensor = gates.new_zeros(self._config(name).num_experts).index_put((indices,), gates)
        return mixture

    def lora_factors(self, shape: SubnetShape | str | None = None, adapter: str | None = None) -> dict[str, LoraPair]:
        """Return the adapter at one shape as plain LoRA pairs, by module name in the base model, at full size.

        Args:
            shape: The shape; None: the active one.
            adapter: Name of the adapter; None: the (first) active one.
        """
        name = self._adapter(adapter)
        weights = self.router.weights(name)
        state = weights.state if shape is None else weights.state_at(shape)
        with self.router.at({name: state}):
            return {
                module_name: LoraPair(*module.lora_factors(name), module.smol_scaling[name])
                for module_name, module in self.model.named_modules()
                if isinstance(module, SmolLinear) and name in module.smol_experts
            }

    def to_lora(
        self, directory: str | os.PathLike[str], shape: SubnetShape | str | None = None, adapter: str | None = None
    ) -> None:
        """Write the adapter at one shape as an ordinary LoRA adapter, which stock PEFT loads without this package.

        Its rank is r for ``combination="factors"`` and k*r for "outputs"; its sizes are those of the base model.

        Args:
            directory: Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
            shape: The shape; None: the active one.
            adapter: Name of the adapter; None: the (first) active one.

        Raises:
            ShapeError: If the adapter was not made for the shape.
            AdapterError: If the adapter also holds whole modules or biases, which a LoRA written here would lose, or
                learned on an elastic model, whose order of channels no checkpoint of the base has.
        """
        name = self._adapter(adapter)
        if any(isinstance(module, PartialLinear) for module in self.model.modules()):
            raise AdapterError(
                "the base model is elastic, its channels are in order of their importance: this LoRA would fit no "
                "checkpoint; write one with save_elastic, then `amoeba extract ELASTIC --shape SHAPE --adapter "
                "separate`"
            )
        write_lora(directory, self.lora_factors(shape, name), self._config(name), self.model)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what LoRA can.

        Raises:
            AdapterError: Always: routers cannot be added up.
        """
        raise AdapterError(
            "SMOL adapters cannot be added up, for each has a router of its own; write each at one shape as a LoRA "
            "(to_lora), load these on the base model and use add_weighted_adapter there"
        )

    def _adapter(self, name: str | None) -> str:
        if name is None:
            name = next(iter(self.active_adapters), None)
        if name is None or name not in self.peft_config:
            raise AdapterError(f"there is no adapter '{name}'; the model has {sorted(self.peft_config)}")
        return name

    def _config(self, name: str) -> SmolConfig:
        config = self.peft_config[name]
        assert isinstance(config, SmolConfig)
        return config

    # What PEFT calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model, not its ``forward`` as PEFT 0.20 does, past the hook that draws the router's noise."""
        return self.model(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter on the model (called by PEFT).

        Raises:
            NoMatchingPeftModuleError: If no module is targeted; the message lists the linear layers that exist.
        """
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            if type(error) is not NoMatchingPeftModuleError:  # where it is ValueError: our own errors, which are such
                raise
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
            raise NoMatchingPeftModuleError(f"{error} Linear layers of this model: {sorted(linear)}.") from error

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config: Any = super()._prepare_adapter_config(peft_config, model_config)
        found = count_layers(self.model)
        if config.num_layers is None:
            if found is None and config.depths not in (None, [1]):
                raise AdapterError(
                    f"depths={config.depths}: the router needs the number of layers, and a "
                    f"{type(self.model).__name__} has no config.num_hidden_layers; set num_layers"
                )
            config.num_layers = found or 1
        elif found is not None and found != config.num_layers:
            raise AdapterError(
                f"this SMOL adapter is for a model with {config.num_layers} layers, but the model has {found}; "
                "load it on the model it was trained on (to serve one subnet, export it with to_lora)"
            )
        config.check()  # the depths and kept layers can be checked now
        return config

    def _check_merge_allowed(self) -> None:
        embeddings = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        for name, module in self.model.named_modules():
            if not isinstance(module, SmolLinear):
                continue
            if getattr(module.get_base_layer(), "keeps_packed", False):
                raise AdapterError(f"'{name}' keeps its weight packed, {NOT_MERGED}")
            if getattr(module.get_base_layer(), "repaired", None) is not None:
                raise AdapterError(f"'{name}' has a repaired weight at this shape beside the shared one, {NOT_MERGED}")
            backend = module.quantization_backend
            if backend is not None and not getattr(backend, "supports_merge", True):
                raise AdapterError(
                    f"'{name}' is quantized by {backend.backend_name}, whose weights cannot be changed, so nothing can "
                    "be merged into it; serve the adapter beside the base model (to_lora())"
                )
            if id(getattr(module.get_base_layer(), "weight", None)) in embeddings:
                raise AdapterError(
                    f"'{name}' shares its weight with the input embeddings, so merging into it would change those too; "
                    "use to_lora() instead, or untie the model first"
                )
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        keep_packed(model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, ShapeRouter):  # a regular expression of a second adapter can match it
            return
        rank = pattern_value(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = pattern_value(peft_config.alpha_pattern, current_key, peft_config.lora_alpha)
        if isinstance(target, SmolLinear):
            self._ensure_router(adapter_name, peft_config, target)
            target.update_layer(adapter_name, rank, alpha, peft_config)
            return
        backend = get_quantization_kwargs(self)
        if not isinstance(target, (nn.Linear, Conv1D)) and resolve_quantization_backend(target, **backend) is None:
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally quantized) "
                "and `transformers.pytorch_utils.Conv1D` are supported."
            )
        layer = SmolLinear(target, self._ensure_router(adapter_name, peft_config, target), **backend)
        layer.train(self.model.training)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, rank, alpha, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _ensure_router(self, adapter_name: str, config: SmolConfig, target: nn.Module) -> ShapeRouter:
        """Return the router with an entry for the adapter, beside the first layer that is adapted.

        Created here and not before the injection: PEFT would take a model with a tuner layer for one that has adapters,
        and leave all its parameters trainable.
        """
        router = getattr(self.model, ROUTER_NAME, None)
        if router is None:
            router = ShapeRouter()
            router.train(self.model.training)
            router.attach(self.model)
            setattr(self.model, ROUTER_NAME, router)
        if not isinstance(router, ShapeRouter):
            raise AdapterError(f"the model has a '{ROUTER_NAME}' of its own, so SMOL cannot put its router there")
        if adapter_name not in router.smol_router:
            weights = router.add_adapter(adapter_name, config).train(self.model.training)
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            device, dtype = device_and_dtype(base)
            if weights.down_weight.device.type != "meta" and device is not None:
                weights.to(device=device, dtype=dtype)
                weights.place()
            router.set_adapter(self.active_adapters)
        return router

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        router = self.router
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        router.detach()
        delattr(self.model, ROUTER_NAME)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError("SMOL has no mixed batches: leave out adapter_names and choose with set_adapter")
        yield


def count_layers(model: nn.Module) -> int | None:
    """Return the number of (decoder) layers that the model's config states; None if it states none."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    if callable(get_text_config):
        config = get_text_config()
    number = getattr(config, "num_hidden_layers", None)
    return number if type(number) is int else None  # a mock or a bool is no number of layers
