"""Cutting a shape out of an elastic checkpoint, from disk to disk."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel

from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.record import ADAPTER_DIRECTORY
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE
from amoeba_plugin.errors import AdapterError, ArtifactError
from amoeba_plugin.extraction.cut import cut_factors, extract
from amoeba_plugin.extraction.model_card import model_card, write_model_card
from amoeba_plugin.extraction.parity import PARITY_NAME, AdapterMode, Parity, measure_parity, with_parameters_in
from amoeba_plugin.runtime.dtypes import saved_dtype, stored_dtype
from amoeba_plugin.runtime.files import is_vacant, require_writable, whole_or_nothing, write_atomically
from amoeba_plugin.runtime.model_files import copy_tokenizer
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol import SmolConfig, SmolModel
from amoeba_plugin.smol.export import write_lora


def extract_checkpoint(
    directory: Path,
    shape: SubnetShape | str,
    output: Path,
    base: str | None = None,
    adapter: AdapterMode = "fold",
    portable: bool = False,
    max_shard_size: str = "5GB",
    *,
    dtype: str = "auto",
) -> Parity:
    """Cut one shape out of an elastic checkpoint and write it as an ordinary checkpoint, with tokenizer, model card and
    ``parity.json`` beside it.

    The base model's weights stay on disk but for one layer at a time, so that the subnet is all that memory must hold.

    Args:
        directory: The elastic checkpoint.
        shape: A shape of its space.
        output: Where the checkpoint goes: new or empty.
        base: Where the base model is now, if it moved.
        adapter: "fold": into the weights. "separate": the checkpoint is cut without it, and ``output/adapter`` is its
            LoRA at this shape, an ordinary PEFT adapter with the subnet's sizes, whose ``base_model_name_or_path`` is
            the absolute path of ``output``.
        portable: Pad layers of different sizes with zeros, so that a stock class holds them; see
            :func:`amoeba_plugin.extraction.cut.extract`.
        max_shard_size: Of a file of weights, for example "5GB"; larger models get several and an index.
        dtype: To save in: "float32", "bfloat16", "float16", or "auto": that of the base model, whatever the training
            computed in.

    Raises:
        ShapeError: If the checkpoint's space does not hold the shape; checked before the base model is loaded.
        ArtifactError: If the output directory is not empty, is in the elastic checkpoint or cannot be written, if that
            checkpoint or its base is damaged, ``max_shard_size`` is no size, or there is no adapter to keep separate.
        AdapterError: If the adapter cannot be a LoRA, because it holds whole modules or biases too.
    """
    parsed = SubnetStrategy.load(directory).space.require(shape)
    _require_output(output, directory, max_shard_size)
    if adapter == "separate" and not (directory / ADAPTER_DIRECTORY).is_dir():
        raise ArtifactError(f"{directory} has no adapter, nothing was trained; leave out --adapter separate")
    if adapter == "separate" and portable:
        raise AdapterError(
            "a separate LoRA has no place in layers padded with zeros; leave out --portable or --adapter"
        )
    with whole_or_nothing(output) as partial:
        elastic, peft_model = load_elastic(directory, base, stream=True)
        separate = peft_model is not None and adapter == "separate"
        if peft_model is not None and separate:
            _write_lora(elastic, peft_model, parsed, partial / ADAPTER_DIRECTORY, output)
        with peft_model.disable_adapter() if peft_model is not None and separate else nullcontext():
            subnet = extract(elastic, parsed, portable)
        computed, base_path = elastic.model.dtype, str(elastic.config.name_or_path)
        saved = saved_dtype(computed, stored_dtype(base_path)) if dtype == "auto" else getattr(torch, dtype)
        with_parameters_in(subnet, saved).save_pretrained(partial, max_shard_size=max_shard_size)
        facts = model_card(elastic, subnet, parsed, "none" if peft_model is None else adapter, portable)
        del subnet  # parity needs the room: it loads what was written
        copy_tokenizer(base or str(elastic.config.name_or_path), partial)
        parity = measure_parity(elastic, parsed, partial)
        write_atomically(partial / PARITY_NAME, json.dumps(vars(parity), indent=1).encode())
        write_model_card(partial, facts | {"parity": parity.in_words})
    return parity


def how_to_load(output: Path, portable: bool) -> list[str]:
    """Return what whoever loads a checkpoint has to know, if anything, in sentences.

    Args:
        output: What :func:`extract_checkpoint` wrote.
        portable: As it was told.
    """
    if (output / PER_LAYER_FILE).is_file():
        return ["its layers differ: load it with trust_remote_code=True, or repeat with --portable for any loader"]
    if portable:
        return ["where its layers differed they are padded with zeros: it loads anywhere, but gains no speed there"]
    return []


def _require_output(output: Path, elastic: Path, max_shard_size: str) -> None:
    if not is_vacant(output):
        what = "is not empty" if output.is_dir() else "is no directory"
        raise ArtifactError(f"{output} exists and {what}; nothing is overwritten: name another directory")
    if elastic.resolve() in output.resolve().parents:
        raise ArtifactError(
            f"{output} is inside the elastic checkpoint {elastic}, and would be gone when that is written anew; name "
            "another directory"
        )
    require_writable(output, whole=True)
    advice = f"max_shard_size '{max_shard_size}' is no size of a file; write 5GB or 500MB"
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except (ValueError, OverflowError) as error:
        raise ArtifactError(advice) from error
    if not float(max_shard_size.strip()[:-2]) > 0:  # the host takes it, and gives every tensor a file of its own
        raise ArtifactError(advice)


def _write_lora(
    elastic: ElasticModel, peft_model: PeftModel, shape: SubnetShape, directory: Path, subnet: Path
) -> None:
    smol = peft_model.base_model
    if not isinstance(smol, SmolModel):
        raise AdapterError(f"a {peft_model.peft_type} adapter cannot be cut to a shape; fold it: leave out --adapter")
    config = copy.copy(smol.peft_config[smol.active_adapters[0]])
    assert isinstance(config, SmolConfig)
    config.base_model_name_or_path = str(subnet.resolve())
    with elastic.active(shape) as model:
        write_lora(directory, cut_factors(elastic, smol, shape), config, model)
