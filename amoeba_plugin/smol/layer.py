"""A linear layer with a mixture of LoRAs beside it."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from amoeba_plugin.errors import AdapterError
from amoeba_plugin.models.compressed_linear import CompressedLinear
from amoeba_plugin.models.slices import Rows, take
from amoeba_plugin.smol.config import SmolConfig
from amoeba_plugin.smol.host import (
    check_adapters_to_merge,
    device_and_dtype,
    layer_sizes,
    quantization_extra_repr,
    resolve_quantization_backend,
    undo_cpu_layout,
)
from amoeba_plugin.smol.packed import PackedBackend
from amoeba_plugin.smol.router import ShapeRouter, SmolLayer

FEW = 16  # tokens at which the products with experts that are not chosen cost less than to copy those that are


class Spread(NamedTuple):
    """What the states of all experts are multiplied by.

    Attributes:
        weights: In front of B, scaled, (E*r,).
        summed: In front of a sum over experts, (E, 1); ``None``: there is none ("outputs").
    """

    weights: Tensor
    summed: Tensor | None


class ExpertBank(nn.Module):
    """The E LoRA pairs of one layer and adapter, stacked.

    Stacked, because every optimizer step and DDP bucket then sees a gradient for each parameter, whatever was routed.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, config: SmolConfig) -> None:
        super().__init__()
        self.rank, self.num_experts, self.combination = rank, config.num_experts, config.combination
        self.A = nn.Parameter(torch.empty(config.num_experts * rank, in_features))  # (E*r, in), expert by expert
        self.B = nn.Parameter(torch.empty(out_features, config.num_experts * rank))  # (out, E*r), expert by expert
        self.reset(config.init_weights)

    def reset(self, init_weights: bool | str) -> None:
        """Initialize: the update is zero at every shape, unless ``init_weights`` is False."""
        if init_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if init_weights is False:
            nn.init.normal_(self.B, std=1 / math.sqrt(self.rank))
        else:
            nn.init.zeros_(self.B)

    def factors(
        self, gates: Tensor, indices: Tensor, in_features: int | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix the chosen experts into one LoRA pair, for the channels in use on either side.

        Args:
            gates: (k,) fp32, the experts' weights.
            indices: (k,) int64, the experts.
            in_features: Input channels in use, the first ones; None: all.
            rows: Output channels in use; None: all.

        Returns:
            A, (rank, in) and B, (out, rank) in the bank's dtype; rank is r for "factors" and k*r for "outputs".
        """
        a = self.A.view(self.num_experts, self.rank, -1)[..., :in_features]  # (E, r, in)
        b = self.B if rows is None else take(self.B, rows)
        b = b.view(-1, self.num_experts, self.rank)  # (out, E, r)
        if self.combination == "factors":
            # A_eff = sum_k g_k A_k, B_eff = sum_k g_k B_k, as products with all E weights, of which E-k are 0: the
            # backward of a selection is a scatter, which costs more than the E-k useless products, and keeps a copy.
            # So would einsum with B, whose experts are not its first dimension.
            mixture = torch.zeros(self.num_experts, dtype=gates.dtype, device=gates.device).scatter(0, indices, gates)
            a_mixed = torch.einsum("e,eri->ri", mixture, a.to(mixture.dtype))
            b_mixed = (b.to(mixture.dtype) * mixture[None, :, None]).sum(dim=1)
            return a_mixed.to(self.A.dtype), b_mixed.to(self.B.dtype)
        a, b = a.index_select(0, indices), b.index_select(1, indices)
        weighted_b = gates[None, :, None] * b
        # sum_k g_k B_k A_k = [g_1 B_1 ... g_k B_k] [A_1; ...; A_k]
        return a.flatten(0, 1), weighted_b.flatten(1).to(self.B.dtype)

    def forward(self, x: Tensor, routing: tuple[Tensor, Tensor] | Spread, rows: Rows, scaling: float) -> Tensor:
        """Return ``s x A^T B^T``, (..., out), for ``x`` (..., in).

        Args:
            x: Inputs.
            routing: Gates and indices of experts, whose factors are mixed; or what their states are mixed by.
            rows: Output channels in use.
            scaling: s.
        """
        if isinstance(routing, Spread):
            return self._mix_states(x, routing, rows)
        gates, indices = routing
        a, b = self.factors(gates, indices, x.shape[-1], rows)
        return F.linear(F.linear(x, a) * scaling, b)  # scaled where the tensor is smallest

    def spread(self, mixture: Tensor, scaling: float) -> Spread:
        """Return what states are mixed by at a mixture of all experts, (E,)."""
        each = mixture.to(self.A.dtype)
        spread = (each * scaling).repeat_interleave(self.rank)
        return Spread(spread, each[:, None] if self.combination == "factors" else None)

    def _mix_states(self, x: Tensor, spread: Spread, rows: Rows) -> Tensor:
        # What the A of all experts make of x is mixed: of a few tokens far less than factors, which stay where they are
        states = F.linear(x, self.A[:, : x.shape[-1]])
        if spread.summed is not None:  # sum_j g_j B_j (sum_k g_k A_k x)
            states = (states.unflatten(-1, (self.num_experts, self.rank)) * spread.summed).sum(-2)
            states = states.repeat(*(1,) * (x.dim() - 1), self.num_experts)
        return F.linear(states * spread.weights, take(self.B, rows))


class SmolLinear(nn.Module, SmolLayer):
    """A linear layer (dense, quantized, or a Conv1D) plus the SMOL update of the active shape.

    ``y = base(x) + s * x A^T B^T`` with A and B mixed by the router. The factors are sliced by the sizes the layer
    sees, so a base layer that computes with a prefix of its channels needs no further coupling; one that computes with
    other rows (a fused linear) names them in ``active_rows``.
    """

    adapter_layer_names = ("smol_experts",)
    other_param_names = ("smol_dropout", "smol_scaling", "initial_scaling", "merged_routing")

    def __init__(self, base_layer: nn.Module, router: ShapeRouter, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        sizes = layer_sizes(self.get_base_layer())
        if sizes[0] is None or sizes[1] is None:
            raise AdapterError(f"SMOL cannot adapt a {type(base_layer).__name__}; target linear layers only")
        self.in_features, self.out_features = sizes
        packed = isinstance(self.get_base_layer(), CompressedLinear)
        self.quantization_backend = (
            PackedBackend() if packed else resolve_quantization_backend(self.get_base_layer(), **kwargs)
        )
        self.smol_experts = nn.ModuleDict()
        self.smol_dropout = nn.ModuleDict()
        self.smol_scaling: dict[str, float] = {}  # s, as scale_layer left it
        self.initial_scaling: dict[str, float] = {}
        self.merged_routing: dict[str, tuple[Tensor, Tensor]] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._router = (router,)  # in a tuple, so that it is not registered (and saved) once per layer

    @property
    def router(self) -> ShapeRouter:
        """The router of all adapted layers of the model."""
        return self._router[0]

    def bank(self, adapter: str) -> ExpertBank:
        """Return the experts of one adapter in this layer."""
        bank = self.smol_experts[adapter]
        assert isinstance(bank, ExpertBank)
        return bank

    def update_layer(self, adapter_name: str, rank: int, alpha: float, config: SmolConfig) -> None:
        """Add the experts of a new adapter, on the base layer's device; the update is scaled by ``alpha / rank``."""
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.smol_dropout[adapter_name] = dropout.train(self.router.training)
        bank = ExpertBank(self.in_features, self.out_features, rank, config).train(self.router.training)
        self.smol_experts[adapter_name] = bank
        # s = alpha / r, or alpha / sqrt(r): rank-stabilized LoRA (arXiv:2312.03732)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.smol_scaling[adapter_name] = self.initial_scaling[adapter_name] = scaling
        self._move_adapter_to_device_of_base_layer(adapter_name, device_and_dtype(self.get_base_layer())[0])
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the updates of the active adapters, (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.smol_experts:
                continue
            bank = self.bank(name)
            inputs = self.smol_dropout[name](self._cast_input_dtype(x, bank.A.dtype))
            result = result + self._update(name, bank, inputs, self._rows(result))
        return result.to(dtype)

    def _update(self, name: str, bank: ExpertBank, inputs: Tensor, rows: Rows) -> Any:
        scaling = self.smol_scaling[name]
        if self.training or inputs.numel() > FEW * inputs.shape[-1]:
            gates, indices = self.router(name)
            return bank(inputs, (gates.to(inputs.device), indices.to(inputs.device)), rows, scaling)
        spread = self.router.once(
            (name, bank.rank, scaling, inputs.device, inputs.dtype),
            lambda: bank.spread(self.router.mixture(name).to(inputs.device), scaling),
        )
        return bank(inputs, spread, rows, scaling)

    def _rows(self, result: Tensor) -> Rows:
        # Of a fused linear every part keeps a prefix: only the base layer can tell which rows those are.
        rows: Rows = getattr(self.get_base_layer(), "active_rows", (slice(0, result.shape[-1]),))
        return rows

    @torch.no_grad()
    def lora_factors(self, adapter: str, routing: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the LoRA pair at the active shape: A, (rank, in) and B, (out, rank), in the bank's dtype, unscaled.

        Args:
            adapter: Name of the adapter.
            routing: Gates and indices to use; None: the router's, without noise.
        """
        bank = self.bank(adapter)
        gates, indices = self.router(adapter, deterministic=True) if routing is None else routing
        return bank.factors(gates.to(bank.A.device), indices.to(bank.A.device))

    @torch.no_grad()
    def get_delta_weight(self, adapter: str, routing: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return ``dW`` at the active shape, (out_features, in_features), at least fp32, without noise."""
        a, b = self.lora_factors(adapter, routing)
        dtype = torch.promote_types(a.dtype, torch.float32)
        # dW = s * B A
        return self.smol_scaling[adapter] * (b.to(dtype) @ a.to(dtype))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates at the active shape to the base weight.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Adapters to merge; None: the active ones.

        Raises:
            ValueError: With ``safe_merge``, if the merged weight is not finite.
            TypeError: If the base layer is quantized in a form that cannot be merged into.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.smol_experts:
                continue
            gates, indices = self.router(name, deterministic=True)
            routing = (gates.detach().clone(), indices.clone())
            self._add_to_base(self.get_delta_weight(name, routing), name, safe_merge)
            self.merged_adapters.append(name)
            self.merged_routing[name] = routing
            self.router.merge(adapter_names=[name])

    def unmerge(self) -> None:
        """Subtract the updates that :meth:`merge` added, at the shape they were merged at."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._add_to_base(-self.get_delta_weight(name, self.merged_routing.pop(name)), name, safe_merge=False)
        self.router.unmerge()

    def _add_to_base(self, delta: Tensor, adapter: str, safe_merge: bool) -> None:
        undo_cpu_layout(self.get_base_layer())
        weight = self.get_base_weight()
        if isinstance(self.get_base_layer(), Conv1D):  # keeps its weight as (in, out)
            delta = delta.T
        merged = (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta.to(weight.device)).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        self.set_base_weight(merged)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale s of the active adapters' updates."""
        for name in self.active_adapters:
            if name in self.smol_scaling:
                self.smol_scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by ``scale``; None: reset it."""
        for name in self.active_adapters:
            if name in self.smol_scaling:
                current = self.smol_scaling[name]
                self.smol_scaling[name] = self.initial_scaling[name] if scale is None else current / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: the update at a shape is ``s B A``, which PEFT can approximate by a LoRA."""
        return True

    def __repr__(self) -> str:
        return "smol." + super().__repr__()

    def extra_repr(self) -> str:
        """Name the quantization backend, if there is one."""
        return str(quantization_extra_repr(self))
