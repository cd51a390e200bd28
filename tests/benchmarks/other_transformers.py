"""Checkpoints whose layers differ, written with one version of transformers and loaded with another.

Usage, first where this package is installed, then in any environment with torch, safetensors and a transformers:

    python tests/benchmarks/other_transformers.py write DIR
    python other_transformers.py load DIR

"write" makes a tiny random model of every architecture, cuts three subnets out of each (layers of different sizes;
layers of one size, some without attention or MLP; both at once), and saves them with the logits of all tokens at once
and the tokens that ``generate`` takes. "load", where this package is hidden, loads each with trust_remote_code=True and
computes them again: all tokens at once, with eager attention, one token after the other with a cache under each name
that the argument has had and with a cache of fixed size, and all at once after saving and loading once more. It prints
the largest difference of each way, ends with one line for all, and fails if one exceeds 1e-4 or a token differs.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

TOLERANCE = 1e-4
POSITIONS, NEW_TOKENS = 9, 6
SHAPES = {"sizes": "3x1/2", "sublayers": "2.5x1", "both": "2.5x1/2"}
TABLE = {"4": [0, 1, 2, 3], "3": [0, 1, 3], "2.5": ["0.mlp", "1.attention", 2, "3.mlp"]}  # layer 0 has no attention
FACTS = "written.json"


class Absent:
    """Finder that hides the packages which a checkpoint must not need."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse them."""
        if name.partition(".")[0] in {"amoeba_plugin", "llmcompressor"}:
            raise ModuleNotFoundError(name)


@torch.no_grad()
def all_at_once(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return logits, (batch, positions, vocabulary)."""
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def step_by_step(model: PreTrainedModel, tokens: Tensor, cache: Any, name: str) -> Tensor:
    """Return logits, (batch, positions, vocabulary), of one token after the other.

    Raises:
        AssertionError: If the cache did not count them.
    """
    steps = []
    for position in range(tokens.shape[1]):
        steps.append(model(tokens[:, position : position + 1], **{name: cache}, use_cache=True).logits)
        assert int(cache.get_seq_length()) == position + 1, f"{name}: {cache.get_seq_length()} at {position}"
    return torch.cat(steps, dim=1)


def generated(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return tokens with those that follow, greedily."""
    return torch.as_tensor(
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False)
    )


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model's answers the same in all versions: sdpa leaves softcapping out in some, and others refuse it."""
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None  # no row ends early
    return model.eval()


def write(root: Path) -> None:
    """Write checkpoints of all architectures, each with what it computes."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from amoeba_plugin.elastic.model import ElasticModel
    from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy
    from amoeba_plugin.extraction.cut import extract
    from amoeba_plugin.testing.random_models import random_model, random_strategy
    from support.architectures import CONFIGS

    root.mkdir(parents=True, exist_ok=True)
    for model_type, config in CONFIGS.items():
        model = prepare(random_model(config))
        strategy = random_strategy(model)
        for width, units in strategy.width.units.items():
            for key in units if width != 1 else ():
                layer = int(key.partition(".")[0])  # the experts of a layer keep the same number
                units[key] -= layer % 2 if key.endswith("attention") else 4 * layer
        depths = DepthStrategy.given(TABLE, 4)
        elastic = ElasticModel(model, SubnetStrategy(depths, strategy.width, strategy.fingerprint))
        tokens = torch.randint(3, config["vocab_size"], (2, POSITIONS), generator=torch.Generator().manual_seed(5))
        for name, shape in SHAPES.items():
            subnet, directory = prepare(extract(elastic, shape)), root / f"{model_type}-{name}"
            assert type(subnet).__name__.startswith("PerLayer"), f"{directory.name} is a {type(subnet).__name__}"
            facts = {"logits": all_at_once(subnet, tokens), "generated": generated(subnet, tokens)}
            with elastic.active(shape) as model_at_shape:
                torch.testing.assert_close(facts["logits"], all_at_once(model_at_shape, tokens), atol=1e-4, rtol=0)
            subnet.save_pretrained(directory)
            save_file({"tokens": tokens} | facts, directory / "computed.safetensors")
            print("wrote", directory.name)
    (root / FACTS).write_text(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}))


def load_one(directory: Path, modules: Path) -> tuple[dict[str, float], list[str]]:
    """Load one checkpoint; return by way of computing the largest difference of logits, and what else is wrong."""

    def loaded(path: Path) -> PreTrainedModel:
        model, report = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
        wrong.extend(f"{kind} of {path.name}: {keys}" for kind, keys in report.items() if keys)
        return prepare(model)

    wrong: list[str] = []
    stored, model = load_file(directory / "computed.safetensors"), loaded(directory)
    tokens, found = stored["tokens"], {}
    found["at once"] = all_at_once(model, tokens)
    names = ["past_key_values"]
    if "cache" in inspect.signature(model.forward).parameters:  # transformers 5.24; it takes the old one until 5.40
        names.append("cache")
    for name in names:
        found[name] = step_by_step(model, tokens, DynamicCache(config=model.config), name)
    fixed = StaticCache(config=model.config, max_cache_len=POSITIONS)
    found["fixed cache"] = step_by_step(model, tokens, fixed, names[-1])
    if not torch.equal(generated(model, tokens), stored["generated"]):
        wrong.append("other tokens are generated")
    model.save_pretrained(modules / "again" / directory.name)
    found["saved again"] = all_at_once(loaded(modules / "again" / directory.name), tokens)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    found["eager"] = all_at_once(model, tokens)
    differences = {way: (logits - stored["logits"]).abs().max().item() for way, logits in found.items()}
    wrong += [f"{way} differs" for way, each in differences.items() if not each <= TOLERANCE]
    return differences, wrong


def load(root: Path) -> None:
    """Load all checkpoints and compare what they compute with what they did where they were written.

    Raises:
        SystemExit: If something differs.
    """
    sys.meta_path.insert(0, Absent())
    written = json.loads((root / FACTS).read_text())
    worst, failed, directories = 0.0, [], sorted(path for path in root.iterdir() if path.is_dir())
    with tempfile.TemporaryDirectory() as modules:
        # the classes' file is copied there, by the name of the checkpoint's folder: no older one's must be there
        transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
        for directory in directories:
            differences, wrong = load_one(directory, Path(modules))
            worst = max(worst, *differences.values())
            failed += [directory.name] if wrong else []
            print(directory.name, *(f"{way} {each:.1e}," for way, each in differences.items()), *wrong)
    print(
        f"{len(directories)} checkpoints written with transformers {written['transformers']} and torch "
        f"{written['torch']}, loaded with transformers {transformers.__version__} and torch {torch.__version__}: "
        f"largest difference of logits {worst:.1e}, {len(failed)} failed {failed or ''}"
    )
    if failed or not directories:
        raise SystemExit(1)


def main() -> None:
    """Write or load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "load"])
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    {"write": write, "load": load}[arguments.what](arguments.directory)


if __name__ == "__main__":
    main()
