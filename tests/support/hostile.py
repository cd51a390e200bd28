"""Recipes, shapes and elastic checkpoints that somebody got wrong, by mistake or on purpose."""

from __future__ import annotations

import copy
import json
from typing import Any

import yaml
from hypothesis import strategies as st

import amoeba_plugin  # noqa: F401  # registers the modifiers
from amoeba_plugin.modifiers import (
    DepthShrinkingModifier,
    OneForAllDistillationModifier,
    SubnetExtractionModifier,
    WidthShrinkingModifier,
)

OURS = {
    each.__name__: each
    for each in (
        DepthShrinkingModifier, WidthShrinkingModifier, OneForAllDistillationModifier, SubnetExtractionModifier
    )
}  # fmt: skip
GOOD: dict[str, Any] = {
    "select_stage": {
        "a_modifiers": {
            "DepthShrinkingModifier": {"min_depth": 1},
            "WidthShrinkingModifier": {"widths": ["1", "3/4", "1/2"]},
        }
    },
    "finetune_stage": {
        "b_modifiers": {
            "OneForAllDistillationModifier": {
                "adapter": {"r": 2, "num_experts": 2}, "max_steps": 1, "gradient_accumulation_steps": 1,
                "elastic_dir": "WORK/elastic",
            }
        }
    },
    "extract_stage": {"c_modifiers": {"SubnetExtractionModifier": {"shape": "1x1/2"}}},
    "quantize_stage": {
        "d_modifiers": {"QuantizationModifier": {"targets": ["Linear"], "scheme": "W8A8", "ignore": ["lm_head"]}}
    },
}  # fmt: skip
# Values that are right somewhere, and values that are right nowhere.
WORDS = [
    "1", "1/2", "3/4", "0.5", "2x1", "1x1/2", "2x3/4", "1.5x1/2", "0x3", "0", "-1", "9/8", "1/0", "nan", "1e-999999999",
    "1e999999999", "9" * 5000, "9" * 5000 + "x1", "", " ", "~", "on", "../..", "lm_head", "Linear", "re:.*", "loss",
    "accuracy", "perplexity", "flap", "wanda", "magnitude", "taylor", "global", "uniform", "measured", "sublayer",
    "layer", "all", "independent", "none", "lora", "smol", "block_influence", "one_shot", "last_layers", "cosine",
    "constant", "W4A16", "W8A16", "W8A8", "FP8", "\x00", "é\u202e", "!!python/object:os.system", "${HOME}",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([2**31, 2**64, 10**400, -(10**30)]),
    st.floats(), st.sampled_from(WORDS), st.text(max_size=6),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
NESTED = st.sampled_from(["[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000, "- " * 3000, "&a [*a]", "<<: *b", "\t"])


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """A good recipe with up to three changes, as YAML or JSON, perhaps with its text damaged."""
    document = copy.deepcopy(GOOD)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 2, 3]))):
        _change(document, draw)
    if draw(st.integers(0, 9)):
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=draw(st.booleans()))
    else:
        text = json.dumps(document)
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(text)))
        text = text[:cut] + draw(NESTED | st.text(max_size=8)) + text[cut + draw(st.integers(0, 30)) :]
    return text


def _change(document: dict[str, Any], draw: st.DrawFn) -> None:
    stage = draw(st.sampled_from(sorted(document) or ["a_stage"]))
    groups = document.get(stage)
    if not isinstance(groups, dict) or not groups or draw(st.integers(0, 19)) == 0:
        document[draw(st.sampled_from([stage, "b_stage", "stage", "x"]))] = draw(VALUES)
        return
    group = draw(st.sampled_from(sorted(map(str, groups))))
    modifiers = groups.get(group)
    if not isinstance(modifiers, dict) or not modifiers or draw(st.integers(0, 14)) == 0:
        if draw(st.booleans()):
            groups.pop(group, None)
        else:
            groups[group] = draw(VALUES)
        return
    name = draw(st.sampled_from(sorted(map(str, modifiers))))
    fields = modifiers.get(name)
    if not isinstance(fields, dict) or draw(st.integers(0, 9)) == 0:
        modifiers[draw(st.sampled_from([name, *OURS, "GPTQModifier", "Unknown"]))] = draw(VALUES)
        return
    known = sorted(OURS[name].model_fields) if name in OURS else ["targets", "scheme", "ignore", "config_groups"]
    fields[draw(st.sampled_from([*known, "unknown"]))] = draw(VALUES)


SHAPES = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=10),
    st.builds("{}x{}".format, st.integers(-1, 4) | st.floats(), st.fractions() | st.floats() | st.sampled_from(WORDS)),
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """A file of JSON or tensors with one thing changed: a value, or bytes."""
    try:
        document = json.loads(data) if draw(st.integers(0, 4)) else None
    except ValueError:
        document = None
    if isinstance(document, dict):
        place: Any = document
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or not place[key] or draw(st.integers(0, 2)) == 0:
                break
            place = place[key]
        if draw(st.integers(0, 4)) == 0:
            del place[key]
        else:
            place[key] = draw(VALUES)
        return json.dumps(document).encode(errors="surrogatepass")
    start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
    return data[:start] + draw(st.binary(max_size=20)) + data[start + length :]


def _fields(**chosen: list[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of some fields, each with one of its values."""
    return st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in chosen.items()})


ADAPTERS = st.one_of(
    st.just("none"),
    st.just({"type": "lora", "r": 2}),
    _fields(combination=["outputs", "factors"], router_noise=[True, False], router_init=["random", "widths"],
            lora_dropout=[0.1], router_load_balancing=[0.1]).map(lambda more: {"r": 2, "num_experts": 2} | more),
)  # fmt: skip
DEPTHS = _fields(
    selector=["dynamic_program", "block_influence", "one_shot", "taylor", "magnitude", "angular_distance",
              "last_layers"],
    objective=["loss", "perplexity"], keep_last=[1], max_batches=[1, 2], granularity=["layer", "sublayer"],
    exchanges=[1], beam=[2], kept_layers=[{"1": [0]}, {"1": [1]}, {"1.5": [0, "1.mlp"], "1": [0]}],
)  # fmt: skip
WIDTHS = _fields(
    importance=["flap", "wanda", "magnitude", "taylor", "group_magnitude"],
    allocation=["measured", "uniform", "global"],
    round_to=[1, 2, {"attention": 1, "mlp": 8}], bias_compensation=[True], anchor_layers=[1, [0]],
)  # fmt: skip
TRAININGS = _fields(
    max_steps=[0], num_random=[0, 1], sampled_shapes=["all", "independent", ["1x1/2"]], loss=["kl", "reverse_kl"],
    loss_balancing=[False], kd_weight=[0, 0.5], distill_all_tokens=[True], gradient_checkpointing=[True],
    train_largest=[False], temperature=[2.0], distill_steps=[1], batch_size=[3],
)  # fmt: skip


@st.composite
def sound_recipes(draw: st.DrawFn) -> str:
    """A recipe of fields that each are right; whether they go together is for the plan to say."""
    document = copy.deepcopy(GOOD)
    select = document["select_stage"]["a_modifiers"]
    select["DepthShrinkingModifier"] |= draw(DEPTHS)
    select["WidthShrinkingModifier"] |= draw(WIDTHS)
    training = document["finetune_stage"]["b_modifiers"]["OneForAllDistillationModifier"]
    training |= {"adapter": draw(ADAPTERS)} | draw(TRAININGS)
    shape = draw(st.sampled_from(["1x1/2", "1x3/4", "1x1", "2x1/2", "2x1", "1.5x1/2"]))
    document["extract_stage"]["c_modifiers"]["SubnetExtractionModifier"] = {"shape": shape} | draw(
        _fields(portable=[True])
    )
    scheme = draw(st.sampled_from(["W8A8", "FP8_DYNAMIC", None]))
    if scheme is None:
        del document["quantize_stage"]
    else:
        document["quantize_stage"]["d_modifiers"]["QuantizationModifier"]["scheme"] = scheme
    if draw(st.integers(0, 9)) == 0:
        del document["finetune_stage"]
    return yaml.safe_dump(document, sort_keys=False)
