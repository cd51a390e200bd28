"""Least squares from second moments: what removed channels of a linear's input said, said by those that stay.

The closed form is that of optimal brain surgeon (Hassibi and Stork 1993) for the weights of one linear, as SparseGPT
(arXiv:2301.00774), ZipLM (arXiv:2302.04089) and SlimGPT (arXiv:2412.18110) use it. Pure functions, in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amoeba_plugin.errors import DataError

STEP, ATTEMPTS = 10.0, 60  # by which a ridge grows where a factorisation fails, and how often
LEAST = 1e-30  # of a ridge, absolute
OUTPUTS = 64  # that a ridge is chosen by: more say the same, and cost as much as the repair


def repaired_columns(weight: Tensor, moments: Tensor, kept: int, ridge: float) -> Tensor:
    """Return the first columns of a weight, changed so that their output is nearest to that of all.

    One of :func:`repaired_prefixes`.
    """
    return repaired_prefixes(weight, moments, [kept], ridge)[kept]


def repaired_prefixes(weight: Tensor, moments: Tensor, kept: Sequence[int], ridge: float) -> dict[int, Tensor]:
    """Return the first columns of a weight, several numbers of them, changed so that their output is nearest to that
    of all.

    ``W_K' = W_K + W_G C_GK (C_KK + ridge mean(diag C) I)^-1`` minimises ``E|W x - W_K' x_K|^2`` plus the ridge times
    the change squared: on the rows that the moments are of, it is never worse than ``W_K``. With ``C + ridge = L L^T``
    that is ``W_K + W_G L_GK L_KK^-1``, so that one factor serves all numbers.

    Args:
        weight: (out, in), any float dtype; columns in order of importance.
        moments: (in, in) fp64, ``C = E[x x^T]`` in the same order; zeros where nothing was seen.
        kept: Columns that stay, the first ones.
        ridge: Relative to the mean of the diagonal; larger where the moments allow no factorisation otherwise.

    Returns:
        For each number (out, number) in fp64, on the moments' device.
    """
    full = weight.to(moments.device, torch.float64)
    scale = moments.diagonal().mean()
    fewer = [count for count in kept if count < len(moments)] if scale > 0 else []
    found = {count: full[:, :count].clone() for count in kept}
    if fewer:
        most = max(fewer)
        factor = factorised(moments[:most, :most], scale * ridge)
        # W_G L_G,: of the columns behind the most that stay, where L_G,: = C_G,: L^-T
        behind = torch.linalg.solve_triangular(factor, moments[:most, most:] @ full[:, most:].mT, upper=False).mT
        for count in fewer:
            said = behind[:, :count] + full[:, count:most] @ factor[count:, :count]
            found[count] += torch.linalg.solve_triangular(factor[:count, :count], said, upper=False, left=False)
    return found


def output_error(weight: Tensor, repaired: Tensor, moments: Tensor) -> Tensor:
    """Return ``E|W x - W' x_K|^2``, a scalar fp64, for W (out, in), W' (out, kept) and moments (in, in)."""
    difference = -weight.to(moments.device, torch.float64)
    difference[:, : repaired.shape[1]] += repaired
    # E|D x|^2 = tr(D C D^T)
    return ((difference @ moments) * difference).sum()


def best_ridge(weight: Tensor, seen: Tensor, held_out: Tensor, kept: int, ridges: Sequence[float]) -> float:
    """Return the ridge of which the repair by some rows is best on others, in the mean over some outputs.

    Args:
        weight: (out, in); of many outputs ``OUTPUTS`` are looked at.
        seen: (in, in) fp64, moments that repair.
        held_out: (in, in) fp64, moments of other rows.
        kept: Columns that stay.
        ridges: To choose from; of equal ones the first.
    """
    weight = weight[:: max(1, len(weight) // OUTPUTS)]
    errors = [float(output_error(weight, repaired_columns(weight, seen, kept, ridge), held_out)) for ridge in ridges]
    return ridges[errors.index(min(errors))]


def factorised(moments: Tensor, ridge: Tensor) -> Tensor:
    """Return the Cholesky factor of moments with a ridge, made larger until there is one.

    Raises:
        DataError: If there is none: the moments are not finite.
    """
    # where there is no ridge to begin with; of channels that are all dead, anything
    least = (moments.diagonal().mean() * torch.finfo(moments.dtype).eps).clamp_min(LEAST)
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    for _ in range(ATTEMPTS):
        factor, failed = torch.linalg.cholesky_ex(moments + ridge * identity)
        if not failed:
            found: Tensor = factor
            return found
        ridge = torch.maximum(ridge * STEP, least)
    raise DataError(
        "second moments of activations are not finite, or have no factor; check the weights and the calibration data, "
        "or set repair: none"
    )
