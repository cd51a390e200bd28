"""What differs between versions of the hosts, all in one place (contract test: ``tests/runtime/test_compat.py``).

A host is asked for what tells its versions apart; its number is read only where a person is told it. Hosts are imported
inside the functions: some take seconds, and not every caller has need of all.

Three differences need no branch, as one way is right in all versions:

* PEFT 0.20 calls the base model's ``forward``, past its hooks, later ones call the model: ``SmolModel.forward`` does.
* transformers 5.24 calls the cache ``cache`` and no longer ``past_key_values`` when it calls attention:
  ``models/modeling_per_layer.py``, which travels with checkpoints and cannot import this, takes all names.
* llm-compressor 0.14 writes another ``config.json`` than the model's: :func:`own_config_saved` does no harm before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from amoeba_plugin.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

TESTED_PEFT = ("0.20", "0.21")  # SMOL is registered through names that PEFT does not promise to keep
PER_LAYER_CONFIG_SINCE = "5.14"  # transformers


# transformers


def has_per_layer_config() -> bool:
    """Tell whether configurations have ``per_layer_config``, by which layers differ: transformers has it since 5.14."""
    from transformers import PretrainedConfig

    return hasattr(PretrainedConfig, "per_layer_config")


def reads_packed_experts() -> bool:
    """Tell whether transformers multiplies packed experts out as it loads them; it does since 5.13."""
    try:
        from transformers.integrations import compressed_tensors
    except ImportError:  # before 5.13 there is no such file
        return False
    return hasattr(compressed_tensors, "DecompressExperts")  # 5.24 has another class, and keeps the name for it


def cache_name(model: nn.Module) -> str:
    """Return what a model calls its cache, as argument and in its output: ``cache`` since transformers 5.24.

    It takes the older one, ``past_key_values``, until 5.40, and warns of it.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def forgets(config: PretrainedConfig) -> bool:
    """Tell whether layers of a model forget what left their window, so that a cache cannot be cropped."""
    from transformers import DynamicCache

    return any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers)


def exchange_checkpointing(model: nn.Module, exchange: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Exchange the functions by which gradient checkpointing runs a model's layers; none are there before it was on."""
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if function is not None:
            vars(module)["_gradient_checkpointing_func"] = exchange(function)


# PEFT


def untested_peft() -> str | None:
    """Return PEFT's version if SMOL was not tested with it."""
    import peft

    version: str = peft.__version__
    return None if version.startswith(TESTED_PEFT) else version


def switch_adapters(modules: Iterable[nn.Module], on: bool) -> None:
    """Switch the adapters of some modules off, or on again; what they train, and whether, stays.

    PEFT's ``enable_adapters`` has what it switches on require gradients, frozen or not before.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in modules:
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = not on


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from laying 4-bit weights out for inference, as it does in an evaluation on a CPU with bf16
    instructions: products with what is laid out so have no gradient, in a training step after it either.

    Raises:
        TrainingError: If weights lie so already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise TrainingError(
                    f"bitsandbytes has laid the 4-bit weight of {name} out for inference, in an evaluation before this "
                    "training, and it has no gradient so; load the model anew and train it first"
                )


def no_match_error() -> type[ValueError]:
    """Return what PEFT raises where nothing is targeted: an error of its own since 0.21, which is a ValueError too."""
    try:
        from peft.utils.error import NoMatchingPeftModuleError
    except ImportError:
        return ValueError
    found: type[ValueError] = NoMatchingPeftModuleError
    return found


def saves_biases() -> bool:
    """Tell whether PEFT saves the biases that a method trains; 0.20 saves those of LoRA and BOFT alone."""
    from peft.tuners.tuners_utils import BaseTuner

    return hasattr(BaseTuner, "_get_learnable_bias_state_dict")  # by which 0.21 does, for every method


# llm-compressor


@contextmanager
def own_config_saved(config: PretrainedConfig) -> Iterator[None]:
    """Let llm-compressor save a model in a block without exchanging its configuration.

    Since 0.14 its ``resave_config`` overwrites ``config.json`` with the file of the model that was loaded: layers and
    sizes of the *whole* model beside a subnet's weights. It keeps its hands off a configuration without
    ``_name_or_path``, so the name is away meanwhile.
    """
    name, config._name_or_path = config._name_or_path, ""
    try:
        yield
    finally:
        config._name_or_path = name
