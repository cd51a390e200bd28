"""Row blocks and modules that see slices of their parameters, against plain indexing."""

from __future__ import annotations

import copy
import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from amoeba_plugin.elastic.linear import ElasticLinear
from amoeba_plugin.models.slices import active_parameters, count, joined, restore_parameters, slice_parameters, take

KEPT = st.sets(st.integers(0, 11), min_size=1)


@given(KEPT)
def test_joined_blocks_are_the_rows_and_no_two_of_them_touch(rows: set[int]) -> None:
    blocks = joined(slice(row, row + 1) for row in rows)
    tensor = torch.arange(24).view(12, 2)
    assert torch.equal(take(tensor, blocks), tensor[sorted(rows)])
    assert torch.equal(take(tensor.T, blocks, dim=1), tensor.T[:, sorted(rows)])
    assert count(blocks) == len(rows)
    assert all(left.stop < right.start for left, right in itertools.pairwise(blocks))
    assert (take(tensor, blocks).data_ptr() == tensor[min(rows)].data_ptr()) == (len(blocks) == 1)


@given(KEPT, st.integers(1, 5))
def test_a_fused_linear_computes_with_its_blocks_and_copies_no_weight(rows: set[int], columns: int) -> None:
    linear = nn.Linear(5, 12)
    inputs = torch.randn(3, columns)
    expected = inputs @ linear.weight[sorted(rows), :columns].T + linear.bias[sorted(rows)]
    elastic = ElasticLinear.convert(linear)
    elastic.active_rows, elastic.active_in = joined(slice(row, row + 1) for row in rows), columns
    torch.testing.assert_close(elastic(inputs), expected)
    elastic(inputs).sum().backward()
    assert set(elastic.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()) == rows


def test_a_forward_sees_slices_and_everybody_else_the_whole_parameters() -> None:
    norm = nn.RMSNorm(8)
    nn.init.normal_(norm.weight)
    whole, keys = norm.weight, list(norm.state_dict())
    slice_parameters(norm)
    norm.active = {"weight": (0, (slice(0, 3), slice(6, 7)))}
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(module.weight))
    norm.normalized_shape = (4,)
    inputs = torch.randn(2, 4)
    expected = inputs * inputs.square().mean(dim=1, keepdim=True).add(torch.finfo(torch.float32).eps).rsqrt()
    torch.testing.assert_close(norm(inputs), expected * whole[[0, 1, 2, 6]])
    assert norm.weight is whole
    assert seen == [whole]
    assert torch.equal(active_parameters(norm)["weight"], whole[[0, 1, 2, 6]])
    assert torch.equal(copy.deepcopy(norm)(inputs), norm(inputs))
    assert list(norm.state_dict()) == keys
    restore_parameters(norm)
    assert type(norm) is nn.RMSNorm


def test_a_forward_that_fails_leaves_the_whole_parameters() -> None:
    norm = nn.RMSNorm(8)
    slice_parameters(norm)
    norm.active = {"weight": (0, (slice(0, 3),))}
    try:
        norm(torch.randn(2, 8))
    except RuntimeError:
        assert len(norm.weight) == 8
    else:
        raise AssertionError("eight channels cannot be scaled by three weights")
