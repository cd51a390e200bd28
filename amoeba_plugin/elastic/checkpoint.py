"""Elastic checkpoints: base model reference + strategy + adapter; every shape is cut from one without training.

::

    DIRECTORY/
      elastic.json                                   what belongs to the checkpoint, and where the base model is
      strategy.json, strategy.safetensors            which layers and channels every shape keeps
      adapter/                                       an ordinary PEFT directory, SMOL or LoRA (absent without one)
      base/                                          only where the base itself was trained: the whole model, reordered

The adapter belongs to the *reordered* base: load it with :func:`load_elastic`, which reorders first.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.lora import attach_lora, follow_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.record import (
    ADAPTER_DIRECTORY,
    BASE_DIRECTORY,
    ELASTIC_NAME,
    read_record,
    write_record,
)
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import AdapterError, ArtifactError
from amoeba_plugin.runtime.dtypes import saved_dtype, store_in, stored_dtype
from amoeba_plugin.runtime.files import is_vacant, whole_or_nothing
from amoeba_plugin.runtime.fsdp import whole_state_dict
from amoeba_plugin.runtime.generation_defaults import keep_generation_defaults, require_generation_defaults
from amoeba_plugin.runtime.model_files import copy_tokenizer, why_not
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.runtime.streaming import StreamedWeights, streamed_model
from amoeba_plugin.runtime.whole_weights import require_weights
from amoeba_plugin.shape import ShapeSpace, SubnetShape, parse_width
from amoeba_plugin.smol import SmolConfig

logger = logging.getLogger(__name__)


def attach_smol(elastic: ElasticModel, config: SmolConfig) -> PeftModel:
    """Put a SMOL adapter on an elastic model; its router follows the active shape.

    Args:
        elastic: Freshly made; its space and kept layers are written into the configuration.
        config: Rank, experts and targets; ``widths``, ``depths``, ``kept_layers`` and ``num_layers`` are filled in
            here.

    Raises:
        AdapterError: If the configuration asks for a depth or width that the base model has not.
    """
    _require_within(config, elastic.space)
    config.widths = [str(width) for width in elastic.space.widths]
    config.depths = list(elastic.space.depths)
    config.kept_layers = elastic.strategy.depth.table
    config.num_layers = len(elastic.layers)
    peft_model = get_peft_model(elastic.model, config)
    _follow(elastic, peft_model)
    return peft_model


def attach_untrained(elastic: ElasticModel, config: PeftConfig) -> PeftModel:
    """Put an adapter of a kind that checkpoints hold on an elastic model, as it is before a training.

    Raises:
        AdapterError: If it cannot be put there.
    """
    fresh = copy.deepcopy(config)  # what is attached fills it in
    if isinstance(fresh, SmolConfig):
        return attach_smol(elastic, fresh)
    assert isinstance(fresh, LoraConfig)  # checkpoints hold no other
    return attach_lora(elastic, fresh)


def adapter_config(directory: Path) -> PeftConfig | None:
    """Return the configuration of an elastic checkpoint's adapter; ``None``: it has none.

    Raises:
        ArtifactError: If it is damaged.
    """
    adapter = directory / ADAPTER_DIRECTORY
    if not adapter.is_dir():
        return None
    try:
        found: PeftConfig = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # PEFT raises anything of a configuration that is not what it wrote
        raise ArtifactError(f"the adapter in {adapter} is damaged ({error}); copy the checkpoint anew") from error
    return found


def attached_config(elastic: ElasticModel) -> PeftConfig | None:
    """Return the configuration of the adapter that an elastic model has on; ``None``: it has none."""
    attached: Mapping[str, PeftConfig] = getattr(elastic.model, "peft_config", {})  # PEFT leaves it on what it changes
    return next(iter(attached.values()), None)


def _require_within(config: SmolConfig, space: ShapeSpace) -> None:
    widths = [width for width in config.widths if parse_width(width) not in space.widths]
    depths = [depth for depth in config.depths or [] if depth not in space.depths]
    if widths or depths:
        asked = ", ".join([f"width {width}" for width in widths] + [f"depth {depth}" for depth in depths])
        raise AdapterError(
            f"the adapter asks for {asked}, but the base model has {space}; leave depths and widths out, they are "
            "filled in"
        )


def save_elastic(
    elastic: ElasticModel, peft_model: PeftModel | None, directory: Path, base: str, trained_base: bool = False
) -> None:
    """Write an elastic checkpoint: all of it or nothing.

    Of several processes the first one writes. Where FSDP2 has sharded the model, all have to come here, and it is
    gathered on the first one's CPU.

    Args:
        elastic: Gives the strategy.
        peft_model: Gives the active adapter; ``None`` where nothing was trained.
        directory: New, empty, or an elastic checkpoint, which is replaced.
        base: Path or hub id under which the base model can be loaded again.
        trained_base: The base itself was trained: write it beside the strategy, whole.

    Raises:
        ArtifactError: If the directory holds something else.
        AdapterError: If several adapters are active: a checkpoint holds one.
    """
    active = [] if peft_model is None else peft_model.active_adapters
    if len(active) > 1:
        raise AdapterError(
            f"an elastic checkpoint holds one adapter, and {', '.join(active)} are active; choose with set_adapter"
        )
    require_replaceable(directory)  # on all processes: one that stopped alone would leave the others waiting below
    with elastic.active(elastic.space.largest) as model:
        strategy = elastic.reordered_strategy() if trained_base else elastic.strategy
        state = whole_state_dict(model if peft_model is None else peft_model)
        if rank() == 0:
            with whole_or_nothing(directory, replace=True) as partial:
                strategy.save(partial)
                if trained_base:
                    keep_generation_defaults(model)
                    # a host's override of save_pretrained compresses
                    PreTrainedModel.save_pretrained(model, partial / BASE_DIRECTORY, state_dict=state)
                    _store_as_base(partial / BASE_DIRECTORY, model, base)
                    copy_tokenizer(base, partial / BASE_DIRECTORY)
                if peft_model is not None:
                    _save_adapter(peft_model, partial / ADAPTER_DIRECTORY, state)
                dtype = str(elastic.model.dtype).removeprefix("torch.")
                write_record(partial, directory, base, dtype, str(elastic.space), trained_base)


def _store_as_base(directory: Path, model: PreTrainedModel, base: str) -> None:
    """Store a trained base as the one it began as, where that is in bf16, to which fingerprints round."""
    saved = saved_dtype(model.dtype, stored_dtype(base))
    if saved == torch.bfloat16 != model.dtype:
        store_in(directory, saved, model.dtype)


def _save_adapter(peft_model: PeftModel, directory: Path, state: Any) -> None:
    """Write the active adapter, whatever its name, where PEFT has the one that it loads."""
    (name,) = peft_model.active_adapters
    peft_model.save_pretrained(str(directory), selected_adapters=[name], state_dict=state)
    if name != "default":  # PEFT gives the others a directory of their own
        for path in (directory / name).iterdir():
            path.replace(directory / path.name)
        (directory / name).rmdir()


def require_replaceable(directory: Path) -> None:
    """Refuse to write an elastic checkpoint over anything but an older one.

    Raises:
        ArtifactError: If the path is a file, or a directory that holds something else.
    """
    if not is_vacant(directory) and not (directory / ELASTIC_NAME).is_file():
        raise ArtifactError(
            f"{directory} exists and is no elastic checkpoint; nothing is overwritten: name another directory"
        )


def load_elastic(
    directory: Path, base: str | None = None, stream: bool = False
) -> tuple[ElasticModel, PeftModel | None]:
    """Load base model, strategy and adapter; the largest shape is active.

    Args:
        directory: What :func:`save_elastic` wrote.
        base: Where the base model is now, if it moved; a trained base is in the directory itself.
        stream: Leave the base model's weights in its safetensors files and load one layer at a time when it is used,
            for extraction; such a model cannot be trained. A base in another format is loaded as a whole.

    Raises:
        ArtifactError: If the directory is no elastic checkpoint, is damaged, or belongs to another base model, or its
            adapter to another space, choice of layers or model.
    """
    record = read_record(directory)
    strategy = SubnetStrategy.load(directory)
    reference = base if base is not None and not record.trained_base else record.base_of(directory)
    adapter = directory / ADAPTER_DIRECTORY
    weights: StreamedWeights | None = None
    require_generation_defaults(reference)
    require_weights(reference)
    record.tell_other_base(reference)
    try:
        streamed = streamed_model(reference, record.dtype) if stream and not _holds_base_weights(adapter) else None
        model: PreTrainedModel
        if streamed is None:
            model = AutoModelForCausalLM.from_pretrained(reference, dtype=record.dtype)
        else:
            model, weights = streamed
    except OSError as error:
        raise ArtifactError(
            f"the base model '{reference}' of {directory} cannot be loaded: {why_not(reference, error)} "
            "Say where it is with --base"
        ) from error
    elastic = ElasticModel(model.eval(), strategy, weights)
    if not adapter.is_dir():
        return elastic, None
    return elastic, _load_adapter(elastic, model, adapter)


def _load_adapter(elastic: ElasticModel, model: PreTrainedModel, adapter: Path) -> PeftModel:
    if not (adapter / SAFETENSORS_WEIGHTS_NAME).is_file():  # PEFT would take pickled ones, or ask a hub
        raise ArtifactError(f"{adapter} lacks {SAFETENSORS_WEIGHTS_NAME}; copy the elastic checkpoint anew")
    try:
        with catch_warnings():
            filterwarnings("ignore", message="Found missing adapter keys")  # they are refused below
            peft_model = PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # PEFT raises anything of a configuration that is not what it wrote
        raise ArtifactError(f"the adapter in {adapter} is damaged or of another model ({error})") from error
    _require_whole_adapter(peft_model, adapter)
    config = peft_model.peft_config["default"]
    if not isinstance(config, SmolConfig | LoraConfig):
        raise ArtifactError(
            f"the adapter in {adapter} is of PEFT's method {config.peft_type}, which does not follow a subnet's sizes; "
            "an elastic checkpoint holds SMOL or LoRA: put back the one that was saved with it"
        )
    if isinstance(config, SmolConfig) and not set(elastic.space) <= set(config.space):
        raise ArtifactError(
            f"the adapter in {adapter} was trained for {config.space}, but the strategy in {adapter.parent} has "
            f"{elastic.space}; put back the one that was saved with it"
        )
    if isinstance(config, SmolConfig) and config.kept_layers not in (None, elastic.strategy.depth.table):
        raise ArtifactError(
            f"the adapter in {adapter} was trained with other layers kept than the strategy beside it keeps; put "
            "back the one that was saved with it"
        )
    _follow(elastic, peft_model)
    return peft_model


def _require_whole_adapter(peft_model: PeftModel, adapter: Path) -> None:
    """Refuse what PEFT completes by random numbers, or loads as it is; log what it passes over."""
    stored = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    missing = sorted(name for name, tensor in expected.items() if tensor.is_floating_point() and name not in stored)
    if missing:
        raise ArtifactError(
            f"the adapter in {adapter} lacks {len(missing)} tensors, of which {missing[0]}: it is not whole, or of "
            "another kind than its configuration says; copy the elastic checkpoint anew"
        )
    broken = next((name for name, tensor in stored.items() if not bool(tensor.isfinite().all())), None)
    if broken is not None:
        raise ArtifactError(f"the adapter in {adapter} is not finite, for example {broken}; repeat the training")
    unknown = sorted(stored.keys() - expected.keys() - peft_model.state_dict().keys())
    if unknown:
        logger.warning(
            "%d tensors of the adapter in %s have names that the model does not know, and are left out: %s, ...",
            len(unknown), adapter, ", ".join(unknown[:2]),
        )  # fmt: skip


def _holds_base_weights(adapter: Path) -> bool:
    """Return whether an adapter's file brings weights of the base model too, which must then be in memory."""
    try:
        with safe_open(adapter / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            return not all("smol_" in key for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):  # no adapter, or a damaged one: loading it says so
        return False


def _follow(elastic: ElasticModel, peft_model: PeftModel) -> None:
    if not isinstance(peft_model.active_peft_config, SmolConfig):
        follow_lora(elastic, peft_model)
        return
    elastic.on_shape_change(partial(_set_shape, elastic, peft_model))  # no closure: a second tree takes it along


def _set_shape(elastic: ElasticModel, peft_model: PeftModel, shape: SubnetShape) -> None:
    peft_model.set_shape(shape, elastic.listed(shape))
