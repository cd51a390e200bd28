"""Steps of layer tuning against plain autograd on models of so many layers, and what a training leaves."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, TrainerCallback

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.errors import RecipeError, TrainingError
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.trainer import AdaptiveLayerTuningTrainer
from support.batches import make_rows
from support.models import require_close, tiny_llama
from support.training import gradients_of, make_arguments, parameters_of

DEPTHS = [1, 3, 4]


def tuned(kind: str = "none", depths: list[int] | None = None, **config: Any) -> tuple[nn.Module, Exits]:
    """Return a model, or an adapter on it ("lora", "smol", perhaps "stacked"), and its exits; every norm is another."""
    stacked = kind == "none" or kind.endswith("stacked")
    exits = Exits(tiny_llama(**config), DEPTHS if depths is None else depths, stacked)
    torch.manual_seed(2)
    with torch.no_grad():
        for depth in exits.depths[:-1]:
            for value in exits.norm(depth).parameters():
                value.add_(torch.rand_like(value))
    saved, targets = exits.modules_to_save, ["q_proj", "down_proj"]
    if kind.startswith("lora"):
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
        return get_peft_model(exits.model, config), exits
    if kind.startswith("smol"):
        config = SmolConfig(
            r=2, num_experts=2, target_modules=targets, modules_to_save=saved, init_weights=False, router_noise=False
        )
        return get_peft_model(exits.model, config), exits
    return exits.model, exits


def make_trainer(
    model: nn.Module, exits: Exits, directory: Path, rows: list[Any] | None = None, **fields: Any
) -> AdaptiveLayerTuningTrainer:
    names = LayerTuningOptions.__dataclass_fields__
    options = {"bottom_dtype": "same"} | {name: fields.pop(name) for name in list(fields) if name in names}
    return AdaptiveLayerTuningTrainer(
        model, exits, LayerTuningOptions(**options), args=make_arguments(directory, **fields),
        train_dataset=make_rows() if rows is None else rows,
    )  # fmt: skip


class Gradients(TrainerCallback):
    """Keeps every step's gradients, by parameter."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.found.append(gradients_of(model))


def next_token_loss(model: PreTrainedModel, batch: dict[str, Tensor], total: int) -> Tensor:
    """Return the loss of a whole model, by hand."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return (
        functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum") / total
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", ["none", "lora", "lora stacked", "smol", "smol stacked"])
def test_a_step_has_the_gradients_of_a_model_that_ends_at_the_exit(
    kind: str, accumulated: int, checkpointing: bool, tmp_path: Path
):
    model, exits = tuned(kind)
    twin, ends = (copy.deepcopy(each) for each in (model, exits.depths))
    noted = Gradients()
    trainer = make_trainer(
        model, exits, tmp_path, policy="cyclic", max_steps=3, learning_rate=0.0,
        gradient_accumulation_steps=accumulated, per_device_train_batch_size=4 // accumulated,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )  # fmt: skip
    trainer.add_callback(noted)
    order: list[Any] = []
    trainer.data_collator = lambda rows: order.append(rows) or PaddingCollator()(rows)
    trainer.train()
    own = Exits(twin.get_base_model() if isinstance(twin, PeftModel) else twin, ends, exits.stacked)
    for step, window in enumerate(trainer.windows):
        rows = [row for part in order[step * accumulated : (step + 1) * accumulated] for row in part]
        batch = PaddingCollator()(rows)
        twin.zero_grad()
        twin.requires_grad_(True)
        if not exits.stacked:  # by the host's own method
            for layer in own.layers[: window.first]:
                for module in layer.modules():
                    if isinstance(module, BaseTunerLayer):
                        module.enable_adapters(False)
        norm = own.norm(window.depth)
        own.adapter.decoder(own.model).norm, whole = norm, own.adapter.decoder(own.model).norm
        own.adapter.decoder(own.model).layers = nn.ModuleList(own.layers[: window.depth])
        next_token_loss(own.model, batch, int((batch["labels"][:, 1:] != -100).sum())).backward()
        if not exits.stacked:
            twin.base_model.enable_adapter_layers()
        own.adapter.decoder(own.model).norm = whole
        own.adapter.decoder(own.model).layers = nn.ModuleList(own.layers)
        expected = {name: value for name, value in gradients_of(twin).items() if name in noted.found[step]}
        assert set(noted.found[step]) == set(expected)
        inside = {f"layers.{layer}." for layer in range(window.first, window.depth)}
        for name, value in noted.found[step].items():
            if "router" in name and exits.stacked:  # of the window's layers alone, where here are those below it, too
                assert not torch.equal(value, expected[name]) or window.first == 0
                continue
            require_close(value, expected[name], 1e-5)
            assert "norm" in name or "router" in name or any(part in name for part in inside)
        assert any(value.abs().max() > 1e-4 for value in noted.found[step].values())


@pytest.mark.parametrize("kind", ["none", "lora", "lora stacked"])
def test_a_step_changes_its_window_alone(kind: str, tmp_path: Path):
    model, exits = tuned(kind)
    seen: list[dict[str, Tensor]] = [parameters_of(model)]

    class Noting(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(parameters_of(model))

    trainer = make_trainer(model, exits, tmp_path, policy="cyclic", max_steps=6, weight_decay=0.1)
    trainer.add_callback(Noting())
    trainer.train()
    for step, (before, after) in enumerate(pairwise(seen)):
        window = trainer.windows[step % 3]
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        layers = {int(name.split("layers.")[1].split(".")[0]) for name in changed if "layers." in name}
        assert layers == set(range(window.first, window.depth))
        norms = {name for name in changed if "layers." not in name}
        if window.depth < 4:
            assert len(norms) == 1
            assert f"_norms.{window.depth}." in norms.pop()
        else:
            assert norms == ({"model.norm.weight"} if kind == "none" else set())
    assert model.training
    assert len(exits.adapter.layers(exits.model)) == 4


def test_what_is_above_the_exit_does_not_run_and_what_is_below_has_no_graph(tmp_path: Path):
    model, exits = tuned(depths=[3, 4])
    trainer = make_trainer(model, exits, tmp_path, policy="sequential", window=1, max_steps=2)
    ran: list[tuple[int, bool]] = []
    for number, layer in enumerate(exits.layers):
        layer.self_attn.register_forward_hook(lambda _m, _a, out, n=number: ran.append((n, out[0].requires_grad)))
    trainer.train()
    assert ran == [(0, False), (1, False), (2, True), (0, False), (1, False), (2, False), (3, True)]


def test_a_cached_bottom_runs_once_for_every_row(tmp_path: Path):
    rows = make_rows(4, targets=11) + make_rows(2, targets=5, length=9)

    def run(**fields: Any) -> tuple[dict[str, Tensor], int]:
        model, exits = tuned(depths=[4])
        trainer = make_trainer(
            model, exits, tmp_path / "training", rows, window=2, max_steps=9, per_device_train_batch_size=2, **fields
        )
        forwards = []
        exits.layers[0].self_attn.register_forward_hook(lambda *_: forwards.append(1))
        trainer.train()
        return parameters_of(model), len(forwards)

    plain, often = run()
    assert often == 9
    for where in ({}, {"cache_dir": tmp_path / "states"}):
        found, once = run(cache_gib=0.1, **where)
        assert once == len(rows)
        for name, value in found.items():
            require_close(value, plain[name], 1e-4)
    again, never = run(cache_gib=0.1, cache_dir=tmp_path / "states")  # as a later process would find them
    assert never == 0
    assert all(torch.equal(value, found[name]) for name, value in again.items())
    _, some = run(cache_gib=3 * 12 * 32 * 4 / 2**30)  # room for three rows
    assert len(rows) < some < 18


def test_kept_states_of_other_weights_are_not_used(tmp_path: Path):
    model, exits = tuned(depths=[4])
    make_trainer(model, exits, tmp_path, window=2, max_steps=1, cache_gib=0.1, cache_dir=tmp_path / "states").train()
    with torch.no_grad():
        exits.layers[0].mlp.down_proj.weight.mul_(2)
    inputs = {"input_ids": torch.tensor([make_rows()[0]["input_ids"]])}
    trainer = make_trainer(model, exits, tmp_path, window=2, cache_gib=0.1, cache_dir=tmp_path / "states")
    found, _ = trainer.bottom.states(2, inputs)
    with torch.no_grad():
        require_close(found, exits.states(inputs, [2])[0][0])


def test_kept_states_of_another_autocast_are_not_used(tmp_path: Path):
    model, exits = tuned(depths=[4])
    inputs = {"input_ids": torch.tensor([make_rows()[0]["input_ids"]])}
    where = {"cache_gib": 0.1, "cache_dir": tmp_path / "states", "bottom_dtype": "same"}
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = make_trainer(model, exits, tmp_path, window=2, **where).bottom.states(2, inputs)
    found, _ = make_trainer(model, exits, tmp_path, window=2, **where).bottom.states(2, inputs)
    with torch.no_grad():
        require_close(found, exits.states(inputs, [2])[0][0])
    assert (found - rounded).abs().max() > 1e-4


def test_the_bottom_computes_in_the_dtype_asked_for(tmp_path: Path):
    model, exits = tuned(depths=[4])
    trainer = make_trainer(model, exits, tmp_path, window=2, max_steps=1, bottom_dtype="bfloat16")
    seen = []
    exits.layers[0].mlp.down_proj.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    exits.layers[3].mlp.down_proj.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    trainer.train()
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("keep", [True, False])
def test_optimizer_states_of_layers_outside_are_dropped_where_asked_for(keep: bool, tmp_path: Path):
    model, exits = tuned()
    trainer = make_trainer(model, exits, tmp_path, policy="sequential", max_steps=3, keep_states=keep)
    trainer.train()
    held = {id(parameter) for parameter in trainer.optimizer.optimizer.state}
    layers = {number for number, layer in enumerate(exits.layers) if {id(p) for p in layer.parameters()} & held}
    assert layers == ({0, 1, 2, 3} if keep else {3})


def test_an_evaluation_measures_every_exit(tmp_path: Path):
    model, exits = tuned("lora")
    rows = make_rows(5)
    trainer = make_trainer(model, exits, tmp_path, policy="random", max_steps=4, per_device_eval_batch_size=8)
    trainer.train()
    metrics = trainer.evaluate(rows)
    for depth in exits.depths:
        with exits.active(depth), torch.no_grad():
            expected = next_token_loss(model.eval(), PaddingCollator()(rows), 25)
        assert metrics[f"eval_loss_exit_{depth}"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss_exit_4"], abs=1e-6)
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert any(name.startswith("loss/exit_") for name in logged)


def test_training_helps_every_exit(tmp_path: Path):
    model, exits = tuned()
    rows = make_rows(8, targets=11)
    trainer = make_trainer(model, exits, tmp_path, rows, max_steps=60, learning_rate=0.01, bottom_dtype="auto")
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    for depth in exits.depths:
        assert after[f"eval_loss_exit_{depth}"] < 0.9 * before[f"eval_loss_exit_{depth}"]


def test_impossible_trainings_are_refused(tmp_path: Path):
    model, exits = tuned()
    with pytest.raises(RecipeError, match="take policy sequential, or exits that are not stacked"):
        make_trainer(model, exits, tmp_path, cache_gib=1.0)
    with pytest.raises(TrainingError, match="make the exits with stacked=True"):
        make_trainer(model, Exits(model, DEPTHS), tmp_path)
    with pytest.raises(TrainingError, match="leave label_smoothing_factor"):
        make_trainer(model, exits, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(RecipeError, match="weights 1, 2 of 3 exits"):
        make_trainer(model, exits, tmp_path, weights=(1, 2))
    for fields, told in (
        ({"window": 0}, "window 0"), ({"policy": "best"}, "random, cyclic, sequential"),
        ({"phase_steps": 0}, "phase_steps 0"), ({"bottom_dtype": "int4"}, "bottom_dtype 'int4'"),
        ({"cache_gib": -1.0}, "cache_gib"), ({"cache_dir": tmp_path}, "say how many GiB"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=told):
            LayerTuningOptions(**fields)
    exits.remove()
    exits = Exits(exits.model, DEPTHS)
    peft_model = get_peft_model(exits.model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match="modules_to_save=exits.modules_to_save"):
        make_trainer(peft_model, exits, tmp_path)


def test_an_adapter_that_trains_what_exits_share_is_refused(tmp_path: Path):
    exits = Exits(tiny_llama(), [4])
    model = get_peft_model(exits.model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(TrainingError, match=r"trains .*lm_head.*, which all exits share"):
        make_trainer(model, exits, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_training_before_a_parameter_changes(tmp_path: Path):
    model, exits = tuned(depths=[3])
    with torch.no_grad():
        exits.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    before = parameters_of(model)
    with pytest.raises(TrainingError, match="the loss of the exit at 3 is nan at step 0"):
        make_trainer(model, exits, tmp_path, max_steps=3).train()
    for name, value in parameters_of(model).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
