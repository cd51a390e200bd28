"""Whether a decoder's layers can be run one at a time: tried on a few tokens, against the decoder itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import MODEL_INPUTS, Batch
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.kept import PARTS
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.depth.one_by_one import OneByOne
from amoeba_plugin.selection.depth.steps import WHOLE, Removed
from amoeba_plugin.selection.objectives import Objective

ROWS, POSITIONS = 2, 64  # of the first batch: what is checked does not depend on the data
TOLERANCE = 16  # times the resolution of the dtype, relative to the largest state


@dataclass(frozen=True)
class Contract:
    """What a check found: ``broken`` says why a decoder cannot be run in lockstep, None that it can."""

    broken: str | None
    returns_tuples: bool = False


def check_contract(
    model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch], stand_ins: StandIns | None = None
) -> Contract:
    """Run a few tokens through subnets in lockstep and through the model itself, with these layers really taken out.

    Args:
        model: Its layers and configuration are restored.
        adapter: Its architecture.
        batches: The first one is used.
        stand_ins: Of its layers, where attention and MLP are to be steps of their own.
    """
    if model._forward_pre_hooks or model._forward_hooks:
        return Contract("the model has forward hooks of its own")
    piece = {name: value[:ROWS, :POSITIONS] for name, value in batches[0].items() if name in MODEL_INPUTS}
    with OneByOne.of(model, adapter, [piece], stand_ins) as trial, evaluating(model):
        return _check(trial, piece)


def _check(trial: OneByOne, piece: Batch) -> Contract:
    layers = trial.layers
    met: list[tuple[int, bool]] = []
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            hook = layer.register_forward_hook(_noting(met, index))
            stack.callback(hook.remove)
        trial.last_states(piece)
    if [index for index, _ in met] != list(range(len(layers))):
        return Contract("its decoder does not call its layers once each, in their order")
    returns_tuples = met[0][1]
    sets = [WHOLE, Removed({0}), Removed(range(1, len(layers), 2))]
    if trial.stand_ins is not None:  # an attention alone; every MLP, and a layer that so loses both
        sets = [WHOLE, Removed({0}), Removed({0, *range(1, 2 * len(layers) - 1, 2)})]
    sets = list(dict.fromkeys(sets))  # of one layer, no other can go
    try:
        found = _in_lockstep(trial, piece, sets, returns_tuples)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return Contract(f"a layer cannot be called on its own ({type(error).__name__}: {error})")
    for removed, states in zip(sets, found, strict=True):
        with trial.active(removed):
            if not _same(states, trial.last_states(piece)):
                what = f"the model without {', '.join(trial.names(removed))}" if removed else "the whole model"
                steps = "layers" if trial.stand_ins is None else "attentions and MLPs"
                return Contract(f"{what} computes something else when its {steps} are called one at a time")
    return Contract(None, returns_tuples)


def _noting(met: list[tuple[int, bool]], index: int) -> Callable[..., None]:
    return lambda module, args, output: met.append((index, not isinstance(output, Tensor)))


def _in_lockstep(trial: OneByOne, piece: Batch, sets: Sequence[Removed], returns_tuples: bool) -> list[Tensor]:
    class LastStates(Objective):
        """Observes the states behind the decoder, (batch, positions, hidden), instead of a loss."""

        def check(self, batches: Sequence[Batch]) -> None:
            pass

        def observe(self, model: PreTrainedModel, batch: Batch) -> Tensor:
            return trial.last_states(batch)

    with Lockstep.of(
        trial.model,
        trial.adapter,
        [piece],
        len(trial.layers) * (1 if trial.stand_ins is None else len(PARTS)),
        float("inf"),
        stand_ins=trial.stand_ins,
        returns_tuples=returns_tuples,
        tokens_at_once=1,
    ) as lockstep:
        return lockstep.observe(LastStates(), sets)


def _same(a: Tensor, b: Tensor) -> bool:
    # The same kernels on the same sizes: next to nothing may differ.
    largest = b.abs().max().item()
    if not math.isfinite(largest):  # for the search to complain of, when it measures the whole model
        return True
    return bool(torch.allclose(a, b, rtol=0, atol=TOLERANCE * torch.finfo(b.dtype).eps * largest))
