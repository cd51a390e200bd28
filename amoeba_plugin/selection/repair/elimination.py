"""What units are worth by the error that is left when they go and the others make up for them: backward elimination.

Optimal brain surgeon (Hassibi and Stork 1993) for whole units of one linear's input, as SlimGPT (arXiv:2412.18110)
prunes heads and neurons. A pure function, in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amoeba_plugin.selection.repair.least_squares import factorised

RIDGE = 1e-2  # relative to the mean of the moments' diagonal; too little, and units are worth what a few rows say
AT_ONCE = 16  # one of so many units that are left goes in a step


def elimination_errors(weight: Tensor, moments: Tensor, size: int, ridge: float = RIDGE) -> Tensor:
    """Score units by the error of the output when all that are worth less are gone too, and the rest is repaired.

    Args:
        weight: (out, in), any float dtype.
        moments: (in, in) fp64, ``C = E[x x^T]``; zeros where nothing was seen.
        size: Neighbouring channels of a unit.
        ridge: Relative to the mean of the diagonal.

    Returns:
        (units,) fp32, in units of ``E|W x|^2``; where nothing was seen zeros.
    """
    units, scale = len(moments) // size, moments.diagonal().mean()
    errors = torch.zeros(units, dtype=torch.float64, device=moments.device)
    if not scale > 0:
        return errors.float()
    left, kept = torch.arange(units, device=moments.device), weight.to(moments.device, torch.float64)
    inverse = torch.cholesky_inverse(factorised(moments, scale * ridge))
    error = torch.zeros_like(scale)
    while len(left):
        worth = _worth(kept, inverse, size)
        least = worth.argsort(stable=True)[: max(1, len(left) // AT_ONCE)]
        errors[left[least]] = error + worth[least].cumsum(0)
        gone = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        gone[least] = True
        channels = gone.repeat_interleave(size)
        # W -= W_S (H^-1_SS)^-1 H^-1_S: , the same of H^-1; the error grows by tr(W_S (H^-1_SS)^-1 W_S^T)
        factor = factorised(inverse[channels][:, channels], scale * 0)
        solved = torch.cholesky_solve(kept[:, channels].mT, factor)
        error = error + (solved * kept[:, channels].mT).sum()
        kept = kept[:, ~channels] - solved.mT @ inverse[channels][:, ~channels]
        others = inverse[channels][:, ~channels]
        inverse = inverse[~channels][:, ~channels] - others.mT @ torch.cholesky_solve(others, factor)
        left = left[~gone]
    return errors.float()


def _worth(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return ``tr(W_u (H^-1_uu)^-1 W_u^T)`` of every unit u: the error if it alone goes."""
    if size == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    units = len(inverse) // size
    columns = weight.view(len(weight), units, size).permute(1, 2, 0)  # (units, size, out)
    blocks = torch.stack([inverse[u * size : (u + 1) * size, u * size : (u + 1) * size] for u in range(units)])
    worth: Tensor = (torch.linalg.solve(blocks, columns) * columns).sum(dim=(1, 2))
    return worth
