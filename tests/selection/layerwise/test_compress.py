"""Bits and zeros as hosts make them, counted as their files hold them; by plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.selection.layerwise.compress import Compressor, input_norms, pruned, rounded
from amoeba_plugin.selection.layerwise.options import Grid, Option, counted_sparsity, listed, require_bits
from amoeba_plugin.selection.layerwise.units import layer_units
from support.batches import make_random_batches
from support.models import make_tiny_model


def by_hand(weight: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """Rounding to the nearest, one group after the other."""
    made = weight.clone()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            least, most = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            if symmetric:
                scale, zero = max(-least, most) / ((high - low) / 2), 0.0
            else:
                scale = (most - least) / (high - low)
                zero = round(min(max(low - least / scale, low), high))
            steps = torch.clamp(torch.round(part / scale + zero), low, high)
            made[row, start : start + group] = (steps - zero) * scale
    return made


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [8, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_to_the_nearest_on_the_grid_of_each_group(bits: int, group: int, symmetric: bool):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits))
    expected = by_hand(weight, bits, group if group > 0 else 24, symmetric)
    assert torch.allclose(rounded(weight, bits, Grid(group, symmetric)), expected, atol=1e-5)


def test_sixteen_bits_are_the_weight_itself():
    weight = torch.randn(3, 8)
    assert rounded(weight, 16, Grid(8)) is weight


def test_zeros_are_where_weight_times_input_is_least_in_every_row():
    generator = torch.Generator().manual_seed(2)
    weight, norms = torch.randn(4, 10, generator=generator), torch.rand(10, generator=generator) * 5
    found = pruned(weight, 0.35, norms)
    for row in range(4):
        least = sorted(range(10), key=lambda column: abs(float(weight[row, column])) * float(norms[column]))[:3]
        assert sorted(torch.nonzero(found[row] == 0).flatten().tolist()) == sorted(least)
    kept = found != 0
    assert torch.equal(found[kept], weight[kept])


def test_norms_are_of_the_real_tokens_of_what_flows_into_a_unit():
    model = make_tiny_model("llama")
    batches = make_random_batches(2, lengths=[12, 9])
    units = layer_units(model, architecture_of(model.config))
    found = input_norms(model, units, batches)
    unit = next(unit for unit in units if unit.name == "2.down_proj")
    total = torch.zeros(unit.columns, dtype=torch.float64)
    for batch in batches:
        seen: list[Tensor] = []
        handle = model.get_submodule(unit.modules[0]).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        handle.remove()
        for row in range(len(batch["input_ids"])):
            for position in range(batch["input_ids"].shape[1]):
                if batch["attention_mask"][row, position]:
                    total += seen[0][row, position].double() ** 2
    assert torch.allclose(found[unit.name].double(), total.sqrt(), rtol=1e-4)


def test_a_model_is_compressed_for_a_block_and_then_itself_again():
    model = make_tiny_model("llama")
    before = {name: each.clone() for name, each in model.named_parameters()}
    units = layer_units(model, architecture_of(model.config))
    choice = {unit: Option(4) if unit.layer == 1 else Option() for unit in units}
    with Compressor(model, Grid(32)).at(choice):
        changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {f"{path}.weight" for unit in units if unit.layer == 1 for path in unit.modules}
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


def test_units_of_a_failed_block_are_themselves_again():
    model = make_tiny_model("llama")
    before = {name: each.clone() for name, each in model.named_parameters()}
    units = layer_units(model, architecture_of(model.config))
    with pytest.raises(ZeroDivisionError), Compressor(model, Grid(32)).at({unit: Option(2) for unit in units}):
        raise ZeroDivisionError
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


def test_counted_bits_are_those_of_scales_and_zero_points_too():
    unit = layer_units(make_tiny_model("llama"), architecture_of(make_tiny_model("llama").config))[0]
    assert unit.columns == 64
    assert Grid(32).counted(4, unit) == 4 + 16 / 32
    assert Grid(32, symmetric=False).counted(4, unit) == 4 + (16 + 4) / 32
    assert Grid(-1).counted(8, unit) == 8 + 16 / 64
    assert Grid(32).counted(16, unit) == 16


def test_counted_zeros_are_whole_weights_of_a_row():
    unit = layer_units(make_tiny_model("llama"), architecture_of(make_tiny_model("llama").config))[0]
    weight = nn.Linear(64, 3).weight
    share = float((pruned(weight, 0.3, torch.ones(64)) == 0).float().mean())
    assert counted_sparsity(Option(16, 0.3), unit) == pytest.approx(share) == pytest.approx(19 / 64)


@pytest.mark.parametrize("bits", [(5,), (4, 6, 16), (16,), (), (1,), (32,)])
def test_bits_that_no_host_holds_are_refused(bits: tuple[int, ...]):
    with pytest.raises(RecipeError, match="4 and 8, which engines serve"):
        require_bits(bits)


def test_groups_are_the_largest_that_fit_every_unit():
    units = layer_units(make_tiny_model("llama"), architecture_of(make_tiny_model("llama").config))
    assert {unit.columns for unit in units} == {64, 128}
    assert Grid.fitting(units).group_size == 64
    odd = layer_units(make_tiny_model("llama", intermediate_size=72), architecture_of(make_tiny_model("llama").config))
    assert Grid.fitting(odd).group_size == -1


def test_lists_of_numbers_are_read():
    assert listed("4, 8,16", int, "bits") == (4, 8, 16)
    with pytest.raises(RecipeError, match="bits '4;8' are no numbers"):
        listed("4;8", int, "bits")
