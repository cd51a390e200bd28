"""SmoothQuant and AWQ: whether what they do to a model leaves its outputs as they are.

Both divide the weights of one module by scales, and multiply by them the weights of the modules that read it. Which
modules these are, llm-compressor knows by the class of the model. Where it names some of the readers only, a router of
experts not being one, or a norm that is read by something else, the checkpoint reloads and computes something else.
So a recipe's modifiers are tried on a small random model of the class, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_named_modules
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modeling.offset_norm import norm_calibration_context
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.smoothquant.utils import MAPPINGS_REGISTRY, LayerMap
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.elastic.subnet_config import build, config_for, is_per_layer
from amoeba_plugin.errors import ArchitectureError, RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter, copy_config
from amoeba_plugin.models.modeling_per_layer import PerLayerSizes

VOCABULARY, POSITIONS = 32, 16
TOLERANCE = 1e-3  # of the largest logit; rounding in fp32 makes 1e-6, a module left out 1e-1
Smoothed = tuple[str, Any, list[Any]]  # name and module of what is divided, modules of what is multiplied
GEMMA = [
    LayerMap(["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"),
    LayerMap(["re:.*gate_proj$", "re:.*up_proj$"], "re:.*pre_feedforward_layernorm$"),
]
ALIKE = {"MixtralForCausalLM": "Qwen3MoeForCausalLM", "Olmo2ForCausalLM": "Olmo3ForCausalLM"}  # to AWQ


def complete_tables() -> None:
    """Tell llm-compressor what its tables lack of the classes that subnets are saved in, and what they have wrong.

    SmoothQuant's take the norm behind Gemma's attention for the one before its MLP. AWQ's lack Mixtral, whose router
    reads what the experts read, and OLMo 2, which has no norms before attention and MLP.
    """
    MAPPINGS_REGISTRY.update(dict.fromkeys(("Gemma2ForCausalLM", "Gemma3ForCausalLM"), GEMMA))
    for name, like in ALIKE.items():
        if like in AWQ_MAPPING_REGISTRY:
            AWQ_MAPPING_REGISTRY.setdefault(name, AWQ_MAPPING_REGISTRY[like])
    tables: tuple[dict[str, Any], ...] = (MAPPINGS_REGISTRY, AWQ_MAPPING_REGISTRY)
    for table in tables:
        for kind in PerLayerSizes.__subclasses__():
            stock = kind.__mro__[kind.__mro__.index(PerLayerSizes) + 1].__name__
            if stock in table:
                table.setdefault(kind.__name__, table[stock])


def smooths(modifier: Modifier) -> bool:
    """Tell whether a modifier is SmoothQuant or AWQ."""
    return isinstance(modifier, SmoothQuantModifier | AWQModifier)


def require_accelerator(modifier: Modifier) -> None:
    """Refuse AWQ where it would fail once all else is done: llm-compressor's pins memory without asking for what.

    Raises:
        RecipeError: If there is no accelerator.
    """
    if isinstance(modifier, AWQModifier) and not torch.accelerator.is_available():
        raise RecipeError(
            "AWQModifier of llm-compressor runs with an accelerator only, and this machine has none; take "
            "GPTQModifier, or run the recipe on a machine that has one"
        )


@torch.no_grad()
def require_outputs_kept(
    modifier: Modifier,
    quantizing: Sequence[QuantizationConfig],
    config: PretrainedConfig,
    adapter: ArchitectureAdapter,
) -> None:
    """Refuse SmoothQuant or AWQ where it would change what a model computes, or finds no modules in it.

    Args:
        modifier: One that :func:`smooths` is true of.
        quantizing: What the recipe quantizes; AWQ leaves alone what is not.
        config: Of the model that it will see.
        adapter: Of the whole model.

    Raises:
        ArchitectureError: Naming the modules, and what to do.
    """
    advice = "give it mappings that name, for each module smoothed, all that read it, or leave it out"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _small_model(config, adapter)
        tokens = torch.randint(VOCABULARY, (2, POSITIONS))
        linearize_moe(model)
        _mark_quantized(model, quantizing)
        with norm_calibration_context(model):
            expected = model(tokens, use_cache=False).logits
            try:
                changed = _changed(model, tokens, expected, _smoothed(modifier, model))
            except (AttributeError, RuntimeError, ValueError) as error:
                raise ArchitectureError(
                    f"it finds no modules to smooth in a {type(model).__name__} ({error.__cause__ or error}); {advice}"
                ) from error
    if changed:
        raise ArchitectureError(
            f"it would change what a {type(model).__name__} computes, by up to {max(changed.values()):.0%} of the "
            f"logits on random weights: {'; '.join(changed)}, which is wrong; {advice}"
        )


def _small_model(config: PretrainedConfig, adapter: ArchitectureAdapter) -> PreTrainedModel:
    """Return a random model with the same modules, but two layers, few heads and neurons, and few tokens."""
    plain = copy_config(config)
    parts = list(getattr(config, "stand_ins", {}))
    if is_per_layer(config):
        plain.per_layer_config = None
    plain.vocab_size = VOCABULARY
    if plain.pad_token_id is not None:
        plain.pad_token_id = 0
    kept = range(min(2, config.num_hidden_layers))
    groups = adapter.channel_groups(plain)
    whole = {group.name: group.units for group in groups}
    small = _accepted(adapter, plain, kept, {"attention": 1, "mlp": 8}, whole)
    if not is_per_layer(config):
        shrunk = adapter.subnet_config(plain, kept, small)
    else:
        other = _accepted(adapter, plain, kept, {"attention": 2, "mlp": 16}, whole)
        lost = {kept[-1]: parts[0]} if parts else {}
        shrunk = config_for(adapter, plain, LayerSizes(kept, [other, small][: len(kept)], lost))
    model = build(shrunk, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # random weights of transformers are so small that a layer adds next to nothing
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.eval()
    return model


def _accepted(
    adapter: ArchitectureAdapter,
    config: PretrainedConfig,
    kept: Sequence[int],
    units: Mapping[str, int],
    whole: Mapping[str, int],
) -> dict[str, int]:
    """Return units per group, those wanted where the class holds them, else all of attention."""
    wanted = {name: units.get(name, count) for name, count in whole.items()}
    try:
        adapter.subnet_config(config, kept, wanted)
    except ArchitectureError:
        return wanted | {"attention": whole["attention"]}
    return wanted


def _mark_quantized(model: PreTrainedModel, quantizing: Sequence[QuantizationConfig]) -> None:
    """Mark linears as llm-compressor does, which is all that AWQ looks for."""
    for config in quantizing:
        for scheme in config.config_groups.values():
            for _, module in match_named_modules(model, scheme.targets, config.ignore):
                vars(module)["quantization_scheme"] = scheme


def _smoothed(modifier: Modifier, model: PreTrainedModel) -> list[Smoothed]:
    """Return what a modifier would smooth; by the host's own look-ups, which have no public name."""
    trial: Any = modifier.model_copy()
    if isinstance(modifier, AWQModifier):
        trial.mappings = trial.mappings or get_layer_mappings_from_model(model)
        trial._set_resolved_mappings(model)
        found = trial._resolved_mappings
    else:
        trial.mappings = trial._infer_mappings_from_model(model)
        found = trial._resolve_mappings(model)
    return [(each.smooth_name, each.smooth_layer, list(each.balance_layers)) for each in found]


def _changed(
    model: PreTrainedModel, tokens: Tensor, expected: Tensor, smoothed: Sequence[Smoothed]
) -> dict[str, float]:
    """Return what is smoothed wrongly, in words, and by how much it changes the logits."""
    if _change(model, tokens, expected, smoothed) <= TOLERANCE:
        return {}
    alike: dict[str, list[Smoothed]] = {}
    for each in smoothed:
        alike.setdefault(_in_words(each, model), []).append(each)
    changes = {words: _change(model, tokens, expected, some) for words, some in alike.items()}
    return {words: change for words, change in changes.items() if change > TOLERANCE}


def _change(model: PreTrainedModel, tokens: Tensor, expected: Tensor, smoothed: Sequence[Smoothed]) -> float:
    """Return by how much the logits change with modules smoothed by random scales, as a share of the largest."""
    touched = {module for _, layer, readers in smoothed for module in (layer, *readers)}
    before = [(part, part.clone()) for module in touched for part in _parts(module)]
    for _, layer, readers in smoothed:
        scales = torch.rand(readers[0].weight.shape[-1]) * 2 + 0.5
        rows = slice(-len(scales), None)  # of a fused linear the last part is meant
        for part in _parts(layer):
            part[rows] /= scales if part.dim() == 1 else scales[:, None]
        for each in readers:
            each.weight.mul_(scales)
    found = model(tokens, use_cache=False).logits
    for part, value in before:
        part.copy_(value)
    return float((found - expected).abs().max() / expected.abs().max())


def _parts(module: Any) -> list[Tensor]:
    return [part for part in (module.weight, getattr(module, "bias", None)) if part is not None]


def _in_words(smoothed: Smoothed, model: PreTrainedModel) -> str:
    name, _, readers = smoothed
    paths = {module: path for path, module in model.named_modules()}
    read_by = sorted({paths[each].rpartition(".")[2] for each in readers})
    return f"{name.rpartition('.')[2]} is taken to be read by {', '.join(read_by)} alone"
