"""The router: which experts a subnet shape uses, and with what weights.

One router serves the whole model. It lives on the root of the base model under the name ``shape_router``, so that
PEFT and transformers treat it as one more tuner layer. The name avoids the prefix ``smol_``: when PEFT deletes an
adapter, it skips modules with the prefix in their name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from amoeba_plugin.errors import AdapterError
from amoeba_plugin.models.kept import Kept
from amoeba_plugin.runtime.recomputation import recompute_as_run
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol.config import SmolConfig
from amoeba_plugin.smol.host import BaseTunerLayer
from amoeba_plugin.smol.router_weights import RouterState, RouterWeights


class SmolLayer(BaseTunerLayer):
    """What PEFT visits when it sets, deletes or merges SMOL adapters: the adapted layers and the router."""


class ShapeRouter(nn.Module, SmolLayer):
    """The routers of all adapters of a model, and its active shape, which all of them follow.

    >>> router.set_shape("24x7/8")  # doctest: +SKIP
    >>> router("default")           # doctest: +SKIP
    (tensor([0.62, 0.38]), tensor([3, 0]))
    """

    adapter_layer_names = ("smol_router",)
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.smol_router = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.in_features = self.out_features = 0
        self.hooks: list[Any] = []
        self.active_shape: tuple[SubnetShape, tuple[Kept, ...] | None] | None = None  # None: the largest, never set
        self._pinned = False
        self._found: dict[tuple[Any, ...], Any] | None = None  # in the forward that is under way; None: is not kept

    def attach(self, root: nn.Module) -> None:
        """Draw fresh noise before each forward of ``root``; gradient checkpointing recomputes layers, with the noise of
        their run."""
        self.hooks = [
            root.register_forward_pre_hook(self.before_forward),
            root.register_forward_hook(self.after_forward),
        ]

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        for hook in self.hooks:
            hook.remove()

    def before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the root. Under ``torch.compile`` it does nothing, and ``set_shape`` draws the noise."""
        if torch.compiler.is_compiling():
            return
        recompute_as_run(self.held, module)
        for name in self._active():
            self.weights(name).place()
            self.weights(name).draw_noise()
        self._found = None if self.training or torch.is_grad_enabled() else {}

    def after_forward(self, *_: Any) -> None:
        """Forward hook of the root: what was found holds for one forward, whose layers all ask for it."""
        self._found = None

    def once(self, key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        """Return what ``find`` does, for which it is called once in a forward of the root without gradients."""
        if self._found is None or torch.compiler.is_compiling():
            return find()
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def add_adapter(self, name: str, config: SmolConfig) -> RouterWeights:
        """Create the router of a new adapter, at the model's active shape."""
        weights = RouterWeights(config)
        self.smol_router[name] = weights
        if self.active_shape is not None:
            weights.follow(*self.active_shape)
        return weights

    def weights(self, name: str) -> RouterWeights:
        """Return the router of one adapter; ``KeyError`` where there is no such adapter."""
        weights = self.smol_router[name]
        assert isinstance(weights, RouterWeights)
        return weights

    def forward(self, adapter: Any, deterministic: bool = False) -> Any:
        """Route the active shape of ``adapter``, see :meth:`RouterWeights.forward`.

        Anything but an adapter's name is returned as it is: a ``Sequential`` base model runs its children in turn.
        """
        if not isinstance(adapter, str):
            return adapter
        return self.once((adapter, deterministic), lambda: self.smol_router[adapter](deterministic))

    def mixture(self, adapter: str) -> Any:
        """Return the weights of all experts at the active shape, (experts,) fp32, zero where not chosen."""
        gates, indices = self(adapter)
        found = torch.zeros(self.weights(adapter).config.num_experts, dtype=gates.dtype, device=gates.device)
        return found.scatter(0, indices, gates)

    def set_shape(self, shape: SubnetShape | str, kept_layers: Sequence[Kept] | None = None) -> None:
        """Set the active shape of the model, which holds for all its adapters, also those that come later.

        Args:
            shape: A shape of the active adapters' space, ``"24x7/8"``.
            kept_layers: The layers that stay, as in ``SmolConfig.kept_layers``; None: each adapter's own table.

        Raises:
            ShapeError: If an active adapter was not made for the shape; then no adapter has changed.
            AdapterError: If adapters are merged at another shape.
        """
        if self._pinned:
            return
        for name in self._active():
            self.weights(name).state_at(shape, kept_layers)
        parsed, kept = SubnetShape.parse(shape), None if kept_layers is None else tuple(kept_layers)
        for name in self.merged_adapters:
            self._require_merged_there(name, parsed, kept)
        self.active_shape = (parsed, kept)
        for name in self.smol_router:
            self.weights(name).follow(parsed, kept)
        for name in self._active():
            self.weights(name).draw_noise()

    def _require_merged_there(self, name: str, shape: SubnetShape, kept_layers: tuple[Kept, ...] | None) -> None:
        merged = self.weights(name).state
        if shape != merged.shape or self.weights(name).state_at(shape, kept_layers).kept_layers != merged.kept_layers:
            raise AdapterError(
                f"adapter '{name}' is merged at shape {merged.shape}, so {shape} cannot be set; call "
                "unmerge_adapter() first"
            )

    @contextmanager
    def at(self, states: dict[str, RouterState]) -> Iterator[None]:
        """Use other states (adapter -> state) for a while."""
        saved = {name: (self.weights(name).state, self.weights(name).refused) for name in states}
        try:
            for name, state in states.items():
                self.weights(name).state, self.weights(name).refused = state, None
            yield
        finally:
            for name, (state, refused) in saved.items():
                self.weights(name).state, self.weights(name).refused = state, refused

    def held(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what brings the routing of now back, for layers that are recomputed in a backward pass."""
        return partial(self.at, {name: self.weights(name).state for name in self.smol_router})

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Let :meth:`set_shape` change nothing for a block of code: the base model's shape changes for a recomputation,
        which :meth:`held` brings its routing back for."""
        before, self._pinned = self._pinned, True
        try:
            yield
        finally:
            self._pinned = before

    def checkpoint_context_fn(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for non-reentrant gradient checkpointing by a loop of one's own, past transformers' layers.

        Those are recomputed as they were run without it. Else the recomputation would see the last shape, and the
        gradients of the others would be silently wrong: pass it as ``context_fn`` to ``torch.utils.checkpoint``.
        """
        return nullcontext(), self.held()()

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.smol_router]

    # What BaseTunerLayer expects of a layer with a weight: the router wraps no layer.

    @property
    def weight(self) -> Any:
        """None: there is no base layer."""
        return None

    @property
    def bias(self) -> Any:
        """None: there is no base layer."""
        return None

    def get_base_layer(self) -> nn.Module:
        """Return the router itself: there is nothing below it."""
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Do nothing: :class:`SmolModel` places the router."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note that the adapters are merged, so that the shape stays what it is."""
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [n for n in names if n in self.smol_router and n not in self.merged_adapters]

    def unmerge(self) -> None:
        """Note that no adapter is merged any more: shapes can be set again."""
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: PEFT's approximate conversion cannot treat a router; ``SmolModel.to_lora`` is exact."""
        return False
