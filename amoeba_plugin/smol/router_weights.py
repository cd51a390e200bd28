"""The router of one adapter: a few parameters, what they are given of the active shape, and the noise of training."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amoeba_plugin.errors import AdapterError, ConfigError, ShapeError
from amoeba_plugin.models.kept import Kept, read_kept
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol.config import SmolConfig, check_kept_layers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

START_LOGIT = 5.0  # with router_init "widths": an expert of the width starts with e^5 = 148 times the weight of another


class RouterState(NamedTuple):
    """What the router sees: the active shape and the noise of the current forward."""

    shape: SubnetShape
    kept_layers: tuple[Kept, ...]  # the layers that stay, ascending
    feature: Tensor  # (num_layers + widths,) fp32: share of every layer that stays, then one-hot width
    noise: Tensor  # (experts,) fp32, standard normal in training
    strength: Tensor  # () fp32, what the update is multiplied by


def shape_feature(kept_layers: Sequence[Kept], width_index: int, num_layers: int, num_widths: int) -> Tensor:
    """Return a shape as the router sees it, (num_layers + num_widths,) fp32.

    >>> shape_feature([0, 2], width_index=1, num_layers=3, num_widths=2).tolist()
    [1.0, 0.0, 1.0, 0.0, 1.0]
    >>> shape_feature([0, "2.mlp"], width_index=0, num_layers=3, num_widths=1).tolist()
    [1.0, 0.0, 0.5, 1.0]
    """
    feature = torch.zeros(num_layers + num_widths)
    layers, lost = read_kept(kept_layers)
    feature[list(layers)] = 1.0
    feature[list(lost)] = 0.5
    feature[num_layers + width_index] = 1.0
    return feature


def importance_loss(mixtures: Tensor) -> Tensor:
    """Return the squared coefficient of variation of the experts' importance, () fp32, 0 where all weigh the same.

    >>> importance_loss(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    tensor(0.1250)

    Args:
        mixtures: (shapes, experts), the weights of every expert at every shape.
    """
    # CV(I)^2 = Var(I) / E(I)^2 with the importance I = the mean weight of an expert (arXiv:1701.06538, eq. 6 and 7)
    importance = mixtures.mean(dim=0)
    return importance.var(correction=0) / importance.mean().square().clamp(min=1e-12)


class RouterWeights(nn.Module):
    """The router of one adapter: from the active shape to the weights of the experts.

    Its parameters are direct ones and in no child module: PEFT strips the adapter's name only from the last two parts
    of a key, so a nested router would load only under the name it was saved with.

    Attributes:
        state: What it routes.
        refused: The model's active shape, where the adapter was not made for it: it cannot be run then.
        draws: () int64, how many times noise was drawn, as it is saved.
    """

    draws: Tensor

    def __init__(self, config: SmolConfig) -> None:
        super().__init__()
        self.config = config
        inputs, experts = (config.num_layers or 1) + len(config.widths), config.num_experts
        self.down_weight, self.down_bias = _linear_init(inputs, config.router_hidden)
        self.up_weight, self.up_bias = _linear_init(config.router_hidden, experts)
        if config.router_noise:  # without noise its weights would never get a gradient, so they must not exist
            self.noise_weight, self.noise_bias = _linear_init(inputs, experts)
        if config.router_init == "widths":
            self._start_at_widths()
        self.generator = torch.Generator()
        self.refused: SubnetShape | None = None
        self._draws, self._seeded = 0, False
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.register_state_dict_pre_hook(_note_draws)  # type: ignore[no-untyped-call]
        self.state = self.state_at(config.space.largest)

    @torch.no_grad()
    def _start_at_widths(self) -> None:
        """Start expert e at width e mod W: hidden unit w sees whether w is the width, and the experts of w score by
        it."""
        widths, experts = len(self.config.widths), self.config.num_experts
        owned = F.one_hot(torch.arange(experts) % widths, widths)  # (experts, widths)
        self.down_weight[:widths] = torch.eye(self.down_weight.shape[1])[-widths:]
        self.down_bias[:widths] = 0.0
        self.up_weight[:, :widths] = START_LOGIT * self.config.router_temperature * owned

    def state_at(self, shape: SubnetShape | str, kept_layers: Sequence[Kept] | None = None) -> RouterState:
        """Return the router's input at ``shape``, without noise.

        Raises:
            ShapeError: If the shape is outside the adapter's space, or ``kept_layers`` do not make up its depth.
        """
        config = self.config
        shape = config.space.require(shape)
        kept = config.kept(shape.depth) if kept_layers is None else tuple(kept_layers)
        try:
            check_kept_layers(kept, shape.depth, config.num_layers)
        except ConfigError as error:
            raise ShapeError(f"shape {shape}: {error}") from error
        width_index = config.space.widths.index(shape.width)
        feature = shape_feature(kept, width_index, config.num_layers or 1, len(config.widths))
        strength = self._place(torch.tensor(config.strengths.get(str(shape), 1.0)))
        return RouterState(shape, kept, self._place(feature), self._place(torch.zeros(config.num_experts)), strength)

    def follow(self, shape: SubnetShape, kept_layers: Sequence[Kept] | None) -> None:
        """Route the model's active shape from now on; an adapter that was not made for it refuses to be run."""
        try:
            self.state, self.refused = self.state_at(shape, kept_layers), None
        except ShapeError:
            self.refused = shape

    def seed_noise(self, seed: int) -> None:
        """Draw the noise of all forwards to come from this seed; for a training that counts its own steps."""
        self.generator.manual_seed(seed)
        self._seeded = True

    def draw_noise(self) -> None:
        """Draw the noise of one forward; in training only, and never in place."""
        self.state = self.with_noise(self.state)

    def with_noise(self, state: RouterState) -> RouterState:
        """Return the state with noise from the router's own generator; in evaluation as it is.

        Unless a training seeds it, the noise depends on ``router_seed``, the shape, and how many times some was drawn
        before, which is saved with the adapter: a training that is resumed draws what it would have drawn.
        """
        if not (self.config.router_noise and self.training):
            return state
        if not self._seeded:
            self.generator.manual_seed(_draw_seed(self.config.router_seed, self._draws, state.shape))
            self._draws += 1
        return state._replace(noise=self._place(torch.randn(self.config.num_experts, generator=self.generator)))

    def place(self) -> None:
        """Move feature and noise to where the parameters are, if they have been moved meanwhile."""
        if self.state.feature.device != self.down_weight.device:
            feature, noise, strength = map(self._place, self.state[2:])
            self.state = self.state._replace(feature=feature, noise=noise, strength=strength)

    def logits(self, feature: Tensor, noise: Tensor | None) -> Tensor:
        """Return the experts' scores, (experts,) fp32, for a feature (num_layers + widths,) and noise (experts,)."""
        # z = W_2 act(W_1 f + b_1) + b_2 + eps * softplus(W_n f + b_n), noisy top-k gating (arXiv:1701.06538, eq. 4);
        # the reference has no activation, so its router is linear in f
        hidden = ACTIVATIONS[self.config.router_nonlinearity](_affine(feature, self.down_weight, self.down_bias))
        logits = _affine(hidden, self.up_weight, self.up_bias)
        if noise is not None and self.config.router_noise:
            logits = logits + noise * F.softplus(_affine(feature, self.noise_weight, self.noise_bias))
        return logits

    def forward(self, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Return which experts the active shape uses, and by what weights.

        Returns:
            Weights of the chosen experts, (k,) fp32, summing to 1, and their indices, (k,) int64. The weights are 0 at
            the whole model where ``adapt_largest`` is off, and where a shape has a strength they make up for it.
        """
        if self.refused is not None:
            raise ShapeError(
                f"the model's active shape is {self.refused}, and this adapter was made for {self.config.space}; set "
                "one of its shapes, or activate another adapter"
            )
        device = self.down_weight.device
        feature, noise = self.state.feature.to(device), self.state.noise.to(device)
        if deterministic or not self.training:
            noise = torch.zeros_like(noise)  # 0 times the noise scale keeps its weights in the graph: DDP wants that
        values, indices = torch.topk(self.logits(feature, noise), self.config.top_k)
        gates = torch.softmax(values / self.config.router_temperature, dim=0) * self._strength().to(device)
        return (gates if self.config.adapt_largest else gates * (1 - self._whole(feature))), indices

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, own in self.named_parameters():
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != own.shape:
                raise AdapterError(
                    f"the saved router's {name} is {tuple(saved.shape)}, but the configuration "
                    f"({self.config.num_layers} layers, widths {', '.join(self.config.widths)}, "
                    f"{self.config.num_experts} experts) wants "
                    f"{tuple(own.shape)}: the tensors are those of another space of shapes; load adapter_config.json "
                    "and adapter_model.safetensors as they were saved together"
                )
        state_dict.setdefault(f"{prefix}draws", self.draws)  # earlier versions did not count
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.draws.device.type != "meta":
            self._draws = int(self.draws)

    def _strength(self) -> Tensor:
        # "factors" weighs both A and B by the gates, so that the update goes with their square
        return self.state.strength.sqrt() if self.config.combination == "factors" else self.state.strength

    def _whole(self, feature: Tensor) -> Tensor:
        """Return () fp32: 1 where every layer is kept at the first width, else 0; no branch, so one compiled graph."""
        layers = len(feature) - len(self.config.widths)
        return feature[:layers].prod() * feature[layers]

    def _place(self, tensor: Tensor) -> Tensor:
        device = self.down_weight.device
        return tensor if device.type == "meta" else tensor.to(device)


def _note_draws(weights: RouterWeights, *_: Any) -> None:
    """Bring the count of draws into what is saved; meanwhile it is a number that no accelerator is asked for."""
    if weights.draws.device.type != "meta":
        weights.draws.fill_(weights._draws)


def _draw_seed(seed: int, draws: int, shape: SubnetShape) -> int:
    # a string is hashed by SHA-512: the same numbers in every process and on every platform
    return random.Random(f"{seed}/{draws}/{shape}").getrandbits(63)


def _linear_init(inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight (outputs, inputs) and bias (outputs,), both uniform in +-1/sqrt(inputs) as ``nn.Linear`` starts."""
    bound = inputs**-0.5
    weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
    return weight, nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``weight @ x + bias`` in at least fp32: as a product and a sum, which autocast leaves alone."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) * x).sum(dim=-1) + bias.to(dtype)
