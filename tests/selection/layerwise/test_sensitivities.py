"""What is said of units and their losses, against the model run as a whole with one unit changed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.subnet_config import weightless
from amoeba_plugin.errors import ArchitectureError, DataError
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.layerwise.compress import Compressor, input_norms, pruned, rounded
from amoeba_plugin.selection.layerwise.options import Grid, Option
from amoeba_plugin.selection.layerwise.search import PolicyBudget, find_policy
from amoeba_plugin.selection.layerwise.task import DenseStates, Scores, SensitivityTask
from amoeba_plugin.selection.layerwise.units import Unit, layer_units, modules_in_order
from amoeba_plugin.selection.registry import sensitivity_named
from support.architectures import CONFIGS, EXPERTS
from support.batches import make_random_batches
from support.models import make_tiny_model

OPTIONS = [Option(3), Option(8), Option(16, 0.4)]
UNIT = "1.gate_proj+up_proj"
Batch = dict[str, Tensor]


def measured(model: PreTrainedModel, name: str, batches: list[Batch]) -> Scores:
    adapter = architecture_of(model.config)
    units = layer_units(model, adapter)
    compressor = Compressor(model, Grid(32), input_norms(model, units, batches))
    with DenseStates.of(LayerRuns.of(model, adapter, batches)) as dense:
        task = SensitivityTask(dense, batches, units, OPTIONS, compressor, progress=False)
        return sensitivity_named(name).measure(task)


def unit_of(model: PreTrainedModel, name: str = UNIT) -> Unit:
    return next(unit for unit in layer_units(model, architecture_of(model.config)) if unit.name == name)


def change(model: PreTrainedModel, option: Option, batches: list[Batch]) -> None:
    """Compress the unit for good."""
    unit = unit_of(model)
    norms = input_norms(model, [unit], batches)[unit.name]
    with torch.no_grad():
        for path in unit.modules:
            linear = model.get_submodule(path)
            zeroed = pruned(linear.weight.detach(), option.sparsity, norms)
            linear.weight.copy_(rounded(zeroed, option.bits, Grid(32)))


def run(model: PreTrainedModel, batch: Batch, *, states: bool = False) -> Tensor:
    with torch.no_grad():
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
            output_hidden_states=states,
        )  # fmt: skip
    found = torch.stack(out.hidden_states) if states else out.logits
    return found[..., batch["attention_mask"].bool(), :]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_kl_is_of_the_whole_model_with_one_unit_changed(option: Option):
    batches = make_random_batches(lengths=[12, 7])
    found = measured(make_tiny_model("llama"), "kl", batches)[UNIT, option]
    dense, changed = make_tiny_model("llama"), make_tiny_model("llama")
    change(changed, option, batches)
    nats, tokens = 0.0, 0
    for batch in batches:
        p, q = (functional.log_softmax(run(model, batch), dim=-1) for model in (dense, changed))
        nats += float((p.exp() * (p - q)).sum())
        tokens += len(p)
    assert found == pytest.approx(nats / tokens, rel=1e-3)
    assert found > 0


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_an_output_error_is_of_the_layer_on_its_dense_input(option: Option):
    """Layer 1 is the one that changes, so that its input is dense in the changed model, too."""
    batches = make_random_batches(lengths=[12, 7])
    found = measured(make_tiny_model("llama"), "output_error", batches)[UNIT, option]
    dense, changed = make_tiny_model("llama"), make_tiny_model("llama")
    change(changed, option, batches)
    wrong = added = 0.0
    for batch in batches:
        before, after = run(dense, batch, states=True)[1:3]
        wrong += float((run(changed, batch, states=True)[2] - after).square().sum())
        added += float((after - before).square().sum())
    assert found == pytest.approx(wrong / added, rel=1e-3)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_fisher_is_the_change_of_weights_by_squared_gradients(option: Option):
    batches = make_random_batches(lengths=[12, 7])
    found = measured(make_tiny_model("llama"), "fisher", batches)[UNIT, option]
    dense, changed = make_tiny_model("llama"), make_tiny_model("llama")
    change(changed, option, batches)
    total, tokens = 0.0, 0
    for batch in batches:
        dense.zero_grad()
        logits = dense(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].flatten()
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum").backward()
        tokens += int((targets != -100).sum())
        for path in unit_of(dense).modules:
            weight, other = (model.get_submodule(path).weight for model in (dense, changed))
            total += float((weight.grad.square() * (other - weight).detach().square()).sum())
    assert found == pytest.approx(total / (2 * tokens), rel=1e-3)


def test_units_are_what_engines_fuse():
    units = layer_units(make_tiny_model("llama", layers=2), architecture_of(make_tiny_model("llama").config))
    assert [unit.name for unit in units] == [
        f"{layer}.{name}"
        for layer in range(2)
        for name in ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
    ]
    qkv = units[4]
    assert qkv.modules == tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    assert (qkv.rows, qkv.columns) == (128 + 64 + 64, 64)


@pytest.mark.parametrize("model_type", sorted(set(CONFIGS) - set(EXPERTS)))
def test_units_of_every_architecture_are_all_linears_of_its_layers_each_once(model_type: str):
    """Without weights, and in the order of the model."""
    config = AutoConfig.for_model(**CONFIGS[model_type])
    model, adapter = weightless(config), architecture_of(config)
    units = layer_units(model, adapter)
    names = [path for unit in units for path in unit.modules]
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers." in path
    }
    assert sorted(names) == sorted(linears)
    assert modules_in_order(units, model) == list(linears)
    assert sum(unit.weights for unit in units) == sum(linear.weight.numel() for linear in linears.values())
    for unit in units:
        assert {linears[path].in_features for path in unit.modules} == {unit.columns}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_mixtures_of_experts_are_refused_with_the_reason(model_type: str):
    config = AutoConfig.for_model(**CONFIGS[model_type])
    with pytest.raises(ArchitectureError, match="reads back one scheme for all layers alone"):
        layer_units(weightless(config), architecture_of(config))


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox", "opt", "phi3"])
def test_a_policy_is_found_for_decoders_of_other_kinds(model_type: str):
    config = AutoConfig.for_model(**CONFIGS[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scores = measured(model, "kl", make_random_batches(1))
    assert len(scores) == len(layer_units(model, architecture_of(config))) * len(OPTIONS)
    assert all(score >= 0 for score in scores.values())


def test_scores_that_are_no_numbers_are_refused():
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.down_proj").weight[0, 0] = float("nan")
    budget = PolicyBudget(average_bits=6)
    with pytest.raises(DataError, match="sensitivity kl of .* is NaN or infinite; check the weights"):
        find_policy(model, architecture_of(model.config), make_random_batches(1), sensitivity_named("kl"), budget)


@pytest.mark.parametrize("name", ["kl", "output_error", "fisher"])
def test_a_policy_is_within_its_averages_and_knows_its_loss(name: str):
    """Measured again by hand, on a model whose weights were changed for good."""
    model, batches = make_tiny_model("llama"), make_random_batches(lengths=[12, 7])
    adapter, budget = architecture_of(model.config), PolicyBudget(6.0, 0.3, exchanges=2)
    found = find_policy(model, adapter, batches, sensitivity_named(name), budget)
    assert found.average_bits <= 6
    assert found.average_sparsity >= 0.3
    norms = input_norms(model, layer_units(model, adapter), batches)
    changed = make_tiny_model("llama")
    with torch.no_grad():
        for unit, policy in found.units.items():
            for path in policy.modules:
                weight = changed.get_submodule(path).weight
                weight.copy_(rounded(pruned(weight, policy.sparsity, norms[unit]), policy.bits, found.grid))
    nats, tokens = 0.0, 0
    for batch in batches:
        p, q = (functional.log_softmax(run(each, batch), dim=-1) for each in (model, changed))
        nats, tokens = nats + float((p.exp() * (p - q)).sum()), tokens + len(p)
    assert found.divergence == pytest.approx(nats / tokens, rel=1e-3)
