"""Configuration of a SMOL adapter: its space of shapes, experts and router; contradictions are refused at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from fractions import Fraction
from typing import Any

from peft import LoraConfig, PeftConfig

from amoeba_plugin.errors import AdapterError, ConfigError, ShapeError
from amoeba_plugin.models.kept import Kept, read_kept, write_kept
from amoeba_plugin.shape import ShapeSpace, SubnetShape, half_steps, parse_depth, parse_width
from amoeba_plugin.smol import host
from amoeba_plugin.smol.host import extend_peft_type

FORMAT_VERSION = 1
COMBINATIONS = ("factors", "outputs")
BIASES = ("none", "all", "smol_only", "lora_only")
NONLINEARITIES = ("none", "relu", "gelu", "silu", "tanh")


LORA_FIELDS = frozenset(LoraConfig.__dataclass_fields__)
# What to do without some of them; the others are left out.
INSTEAD = {
    "ensure_weight_tying": "leave embed_tokens and lm_head out of target_modules and modules_to_save, so that they "
    "stay tied, or untie the model first (tie_word_embeddings: false)",
    "target_parameters": "name linear layers in target_modules",
    "trainable_token_indices": "train the embeddings as a whole by modules_to_save, in an untied model",
    "use_dora": "a subnet does not have the whole weight that DoRA scales: leave it out",
}


@dataclass
class SmolConfig(PeftConfig):
    """SMOL: a mixture of LoRAs whose weights depend on the active subnet shape, not on the token.

    >>> config = SmolConfig(r=64, depths=[24, 28, 32], widths=["1", "7/8"], num_layers=32, target_modules="all-linear")
    >>> str(config.space)
    'depths {32, 28, 24} x widths {1, 7/8}'

    Args:
        r: Rank of each expert.
        lora_alpha: Every update is scaled by ``lora_alpha / r`` (by ``lora_alpha / sqrt(r)`` with ``use_rslora``).
        num_experts: Number of LoRA pairs per layer, E.
        top_k: Experts mixed at a shape, k. With ``top_k=1`` the only weight is always 1, so the router cannot learn.
        lora_dropout: Dropout probability of the adapter's input.
        widths: Widths of the shape space as exact fractions, "1", "7/8"; stored largest first.
        depths: Depths of the shape space, in layers; 10.5 is 21 sublayers. None: only the full depth.
        kept_layers: For each depth (as a string) the layers that stay, as a strategy chose them: indices, and "2.mlp"
            or "2.attention" for a layer that keeps only that. A depth that is missing here drops its deepest layers but
            the very last: 6 layers at depth 4 keep 0, 1, 2, 5.
        num_layers: Decoder layers of the base model; None: read from the model.
        combination: "outputs": ``dW = s sum g_k B_k A_k``, rank k*r (the paper's figure), computed as one LoRA of rank
            k*r; "factors": ``dW = s (sum g_k B_k)(sum g_k A_k)``, rank r (the reference code).
        router_noise: Noisy top-k: add noise to the router's logits, in training only.
        router_hidden: Width of the router's hidden layer.
        router_seed: Seed of the router's own noise generator, in a training loop of one's own. One-for-all training
            seeds it anew for every micro-batch, from its own seed, so that a run that goes on later draws the same.
        router_init: Where the router starts: "random" (the reference), all shapes at nearly the same mixture, or
            "widths", experts dealt to the widths in turn, so that wide and narrow subnets do not disturb each other
            from the first step. Either learns from there.
        router_temperature: Divides the k chosen logits before the softmax.
        router_load_balancing: Weight of the term that keeps the shapes from sharing the same few experts, see
            :meth:`SmolModel.load_balancing_loss`; 0: none, as in the reference. Off, because the few shapes of a space
            may well be served best by few experts: a token router needs the term for equal loads on devices, here it
            trades quality for diversity.
        adapt_largest: False: at the whole model all weights are 0, so it stays the base model whatever was trained.
        strengths: Shape -> factor of its update, ``{"12x3/4": 0.6}``, 1 for shapes that are not named; as
            :func:`amoeba_plugin.training.one_for_all.strengths.fit_strengths` finds them after a training.
        router_nonlinearity: Between the router's two layers: "none" (as the reference), "relu", "gelu", "silu", "tanh".
        init_weights: True: A Kaiming-uniform and B zero; "gaussian": A normal with std 1/r and B zero; False: both
            random.
        use_rslora: Scale by ``lora_alpha / sqrt(r)``.
        rank_pattern: Module name or regular expression -> rank, overriding ``r``.
        alpha_pattern: Module name or regular expression -> alpha, overriding ``lora_alpha``.
        target_modules: Names of the modules to adapt, a regular expression, or "all-linear"; None: PEFT's choice for
            LoRA on this architecture.
        exclude_modules: Names (or a regular expression) of modules to leave out.
        layers_to_transform: Indices of the layers to adapt; None: all.
        layers_pattern: Name of the layer list that ``layers_to_transform`` counts in.
        modules_to_save: Modules to train in full and to save with the adapter.
        bias: "none", or train the base model's own biases too: "all" of them, or those of the adapted layers
            ("smol_only"; "lora_only" means the same). They change the base model at every shape at once.
        format_version: Version of the saved adapter.
        init_lora_weights: LoRA's name for ``init_weights``; not kept.
        fan_in_fan_out: Taken from a script for LoRA and not kept: a ``Conv1D`` is recognised.

    Raises:
        ConfigError: If the fields contradict each other.
        AdapterError: If ``format_version`` is newer than this package.
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "Updates are scaled by lora_alpha / r."})
    num_experts: int = field(default=5, metadata={"help": "LoRA pairs per layer."})
    top_k: int = field(default=2, metadata={"help": "Experts mixed at a shape."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input."})
    widths: list[str] = field(default_factory=lambda: ["1"], metadata={"help": "Widths of the shape space."})
    depths: list[float] | None = field(default=None, metadata={"help": "Depths of the shape space."})
    kept_layers: dict[str, list[Kept]] | None = field(default=None, metadata={"help": "Depth -> layers that stay."})
    num_layers: int | None = field(default=None, metadata={"help": "Decoder layers of the base model."})
    combination: str = field(default="outputs", metadata={"help": "'outputs' or 'factors'."})
    router_noise: bool = field(default=True, metadata={"help": "Noise on the router's logits in training."})
    router_hidden: int = field(default=16, metadata={"help": "Width of the router's hidden layer."})
    router_seed: int = field(default=0, metadata={"help": "Seed of the router's noise, in one's own loop."})
    router_init: str = field(default="random", metadata={"help": "'random' or 'widths'."})
    router_temperature: float = field(default=1.0, metadata={"help": "Temperature of the softmax over the k."})
    router_nonlinearity: str = field(default="none", metadata={"help": "Between the router's two layers."})
    router_load_balancing: float = field(default=0.0, metadata={"help": "Weight of the load-balancing loss."})
    adapt_largest: bool = field(default=True, metadata={"help": "False: the whole model stays the base model."})
    strengths: dict[str, float] = field(default_factory=dict, metadata={"help": "Shape -> factor of its update."})
    init_weights: bool | str = field(default=True, metadata={"help": "True, False or 'gaussian'."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module pattern -> rank."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Module pattern -> alpha."})
    target_modules: Any = field(default=None, metadata={"help": "Names or regular expression of modules to adapt."})
    exclude_modules: Any = field(default=None, metadata={"help": "Names or regular expression of modules to skip."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved in full."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'smol_only'."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the saved adapter."})
    init_lora_weights: InitVar[bool | str | None] = None
    fan_in_fan_out: InitVar[bool | None] = None

    def __new__(cls, *args: Any, **fields: Any) -> SmolConfig:
        """Refuse what LoRA has and SMOL lacks, with what to do, before the dataclass does without."""
        lacking = sorted((fields.keys() & LORA_FIELDS) - cls.__dataclass_fields__.keys())
        if lacking:
            raise ConfigError(f"SMOL has no {lacking[0]}, which LoRA has; {INSTEAD.get(lacking[0], 'leave it out')}")
        return super().__new__(cls)

    def __post_init__(self, init_lora_weights: bool | str | None, fan_in_fan_out: bool | None) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = extend_peft_type("SMOL")
        if self.format_version > FORMAT_VERSION:
            raise AdapterError(
                f"this SMOL adapter has format version {self.format_version}, but this package reads up to "
                f"{FORMAT_VERSION}; upgrade the package"
            )
        if init_lora_weights is not None:
            self.init_weights = init_lora_weights
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.check()

    def check(self) -> None:
        """Check that the fields fit each other, and the model once ``num_layers`` is known.

        Raises:
            ConfigError: If they do not.
        """
        self._check_experts()
        self._check_targets()
        self._check_space()
        self._check_strengths()

    def _check_experts(self) -> None:
        for name in ("r", "num_experts", "top_k", "router_hidden"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give a whole number of at least 1")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"top_k={self.top_k} experts cannot be chosen from num_experts={self.num_experts}; lower top_k"
            )
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, int | float):
                raise ConfigError(f"{name}={alpha!r}: the scale of the updates, give a number")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout={self.lora_dropout}: a probability in [0, 1) is needed")
        if not self.router_temperature > 0:
            raise ConfigError(
                f"router_temperature={self.router_temperature}: it divides the logits, give a number above 0"
            )
        if not self.router_load_balancing >= 0:
            raise ConfigError(
                f"router_load_balancing={self.router_load_balancing}: the weight of a loss, give 0 (off) or more"
            )
        for name, choices in (
            ("combination", COMBINATIONS),
            ("router_nonlinearity", NONLINEARITIES),
            ("router_init", ("random", "widths")),
            ("init_weights", (True, False, "gaussian")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, choices))}")
        if self.router_init == "widths" and isinstance(self.widths, list) and len(self.widths) > self.router_hidden:
            raise ConfigError(
                f"router_init='widths' takes a hidden unit for each of the {len(self.widths)} widths, but "
                f"router_hidden={self.router_hidden}; raise it"
            )
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise ConfigError(f"rank_pattern gives '{pattern}' rank {rank}: give at least 1")

    def _check_targets(self) -> None:
        if self.bias not in BIASES:
            raise ConfigError(f"bias={self.bias!r}: choose one of {', '.join(BIASES)}")
        if self.bias != "none" and not host.SAVES_BIASES:
            raise ConfigError(
                f"bias={self.bias!r}: this version of PEFT trains the biases of a method and does not save them; "
                "take PEFT 0.21, or bias='none'"
            )
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _check_space(self) -> None:
        if not is_list(self.widths, str | int | float | Fraction):
            raise ConfigError(f"widths={self.widths!r}: give a list, such as ['1', '7/8']")
        if self.depths is not None and not is_list(self.depths, int | float):
            raise ConfigError(f"depths={self.depths!r}: give a list of whole or half numbers, such as [24, 32]")
        try:
            widths = {parse_width(width) for width in self.widths}
        except ShapeError as error:
            raise ConfigError(f"widths={self.widths}: {error}") from error
        if not widths:
            raise ConfigError(f"widths={self.widths!r}: give a list with at least one width, such as ['1', '7/8']")
        self.widths = [str(width) for width in sorted(widths, reverse=True)]
        if self.num_layers is not None and self.num_layers < 1:
            raise ConfigError(f"num_layers={self.num_layers}: a model has at least 1 layer")
        if self.depths is not None:
            try:
                self.depths = sorted(set(map(half_steps, self.depths)), reverse=True)
            except ShapeError as error:
                raise ConfigError(f"depths={self.depths}: {error}") from error
            if not self.depths or self.depths[-1] < 1:
                raise ConfigError(f"depths={self.depths}: give at least one depth, each of at least 1 layer")
            if self.num_layers is not None and self.depths[0] > self.num_layers:
                raise ConfigError(f"depth {self.depths[0]} exceeds the model's {self.num_layers} layers; lower depths")
        if self.kept_layers is not None:
            self.kept_layers = {str(depth): list(kept) for depth, kept in self.kept_layers.items()}
            for text, layers in self.kept_layers.items():
                try:
                    depth = parse_depth(text)
                except (ShapeError, ValueError) as error:
                    raise ConfigError(
                        f"kept_layers names the depth '{text}'; its keys are whole or half numbers, as strings"
                    ) from error
                check_kept_layers(layers, depth, self.num_layers)

    def _check_strengths(self) -> None:
        for text, strength in self.strengths.items():
            try:
                shape = SubnetShape.parse(text)
            except ShapeError as error:
                raise ConfigError(f"strengths names the shape '{text}': {error}") from error
            if str(shape) != text:
                raise ConfigError(f"strengths names the shape '{text}'; write {shape}")
            if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
                raise ConfigError(f"strengths of {text} is {strength!r}: a factor of the update, give 0 or more")

    @property
    def space(self) -> ShapeSpace:
        """The shapes this adapter is trained for: all pairs of its depths and widths.

        Raises:
            ConfigError: If neither ``depths`` nor ``num_layers`` is known yet.
        """
        depths = self.depths or ([self.num_layers] if self.num_layers else None)
        if depths is None:
            raise ConfigError("the depths are unknown until the adapter is on a model; set depths or num_layers")
        return ShapeSpace(tuple(depths), tuple(parse_width(width) for width in self.widths))

    def kept(self, depth: float) -> tuple[Kept, ...]:
        """Return the layers that stay at ``depth``, ascending (needs ``num_layers``)."""
        if self.num_layers is None:
            raise ConfigError("num_layers is unknown until the adapter is on a model; set it")
        if self.kept_layers is not None and str(depth) in self.kept_layers:
            return tuple(self.kept_layers[str(depth)])
        whole = int(depth)
        half = () if whole == depth else (f"{whole - 1}.mlp",)
        return (*range(whole - 1), *half, self.num_layers - 1)


def is_list(value: Any, kind: Any) -> bool:
    """Tell whether this is a list (or tuple, or range) of elements of this kind."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(x, kind) for x in value)


def check_kept_layers(layers: Sequence[Kept], depth: float, num_layers: int | None) -> None:
    """Check that ``layers`` are ascending layers that make up ``depth``; ``"2.mlp"`` is half a layer.

    Raises:
        ConfigError: If they are not.
    """
    try:
        indices, lost = read_kept(layers)
    except ShapeError as error:
        raise ConfigError(f"kept_layers {list(layers)}: list each index once, ascending, from 0; {error}") from error
    if list(layers) != write_kept(indices, lost):
        raise ConfigError(f"kept_layers {list(layers)}: list each index once, ascending, from 0")
    kept = half_steps(len(indices) - len(lost) / 2)
    if kept != depth:
        raise ConfigError(f"depth {depth} keeps {depth} layers, but kept_layers lists {kept}: {list(layers)}")
    if num_layers is not None and indices and indices[-1] >= num_layers:
        raise ConfigError(f"kept_layers names layer {indices[-1]}, but the model has layers 0 to {num_layers - 1}")
