"""ONNX Runtime's model builder, of onnxruntime-genai. An engine file.

It runs in the Python that has onnxruntime-genai, onnx and onnx-ir beside torch and transformers. One thing is done
around the builder: it is told of a sliding window that a class has in all layers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import onnx
from onnxruntime_genai.models import builder

# Of a prompt the last position's logits alone, as engines do: else the head takes much of a prefill. And a cache of all
# positions also where a window slides: of the window alone, it must begin full, which simple programs do not know.
OPTIONS = ("prune_lm_head=true", "windowed_kv_cache=false", "hf_token=false")
SLIDE_ALL = ("mistral", "phi3")  # types of models without layer_types, of which a window is in every layer
WEIGHT = {"MatMulNBits": 1, "GatherBlockQuantized": 0}  # which input of a node is the quantized weight


class Engine:
    """Exports."""

    def about(self) -> dict[str, str]:
        """Return what exports."""
        return {"builder": f"onnxruntime-genai {version('onnxruntime-genai')}"}

    def build(self, subnet: str, scheme: str, directory: str) -> dict[str, int]:
        """Write a checkpoint as ONNX; return how many weights came out as which type.

        Args:
            subnet: Directory of the checkpoint.
            scheme: fp32 or int4.
            directory: To be written.
        """
        with tempfile.TemporaryDirectory() as scratch:
            told = _with_windows(Path(subnet), Path(scratch) / "subnet")
            asked = (str(told), "", directory, scheme, "cpu", f"{scratch}/cache")
            builder.create_model(*asked, **builder.parse_extra_options(*asked, OPTIONS))
        return _types(Path(directory) / "model.onnx")


def _with_windows(subnet: Path, directory: Path) -> Path:
    """Return a checkpoint whose configuration says which layers have a sliding window, as the builder reads it.

    Without ``layer_types`` it gives none to any layer: wrong logits behind the window.
    """
    config = json.loads((subnet / "config.json").read_text(encoding="utf-8"))
    if config.get("sliding_window") is None or config.get("layer_types") or config["model_type"] not in SLIDE_ALL:
        return subnet
    config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    shutil.copytree(subnet, directory, copy_function=lambda source, target: Path(target).symlink_to(source))
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def _types(file: Path) -> dict[str, int]:
    """Return how many weights are of which type; a quantized one is one, with its scales, and integers are none."""
    graph = onnx.load(str(file), load_external_data=False).graph
    bits: dict[str, int] = {}
    belong: set[str] = set()
    for node in graph.node:
        if node.op_type in WEIGHT:
            name = node.input[WEIGHT[node.op_type]]
            bits[name] = next((each.i for each in node.attribute if each.name == "bits"), 4)
            belong.update(node.input)
    types = Counter(f"INT{each}" for each in bits.values())
    for tensor in graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if tensor.name not in belong and "INT" not in kind:
            types[kind] += 1
    return dict(types)
