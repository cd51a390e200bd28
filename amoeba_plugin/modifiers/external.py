"""Steps of one-for-all training inside a loop that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.errors import TrainingError
from amoeba_plugin.runtime.ranks import world_size
from amoeba_plugin.training.one_for_all.micro_batch import MicroBatch, Share
from amoeba_plugin.training.one_for_all.step import SubnetStep


class ExternalSteps:
    """Counts the micro-batches of a loop that fires events, and differentiates them.

    Args:
        subnets: The step.
        trained: What the loop trains: the model, or the ``PeftModel`` around it.

    Attributes:
        batch_data: The micro-batch that has begun: ``input_ids``, ``labels`` and perhaps ``attention_mask``.
    """

    def __init__(self, subnets: SubnetStep, trained: PreTrainedModel | PeftModel) -> None:
        self.subnets, self.trained = subnets, trained
        self.batch_data: Mapping[str, Any] = {}
        self._place = (-1, -1)

    def begin(self, batch_data: Mapping[str, Any], global_step: int) -> None:
        """Prepare for a micro-batch, before the loop's own forward of the largest subnet.

        Raises:
            TrainingError: If there are several processes: their losses and gradients would not be balanced together.
        """
        if world_size() > 1:
            raise TrainingError(
                f"a recipe that a Trainer of your own drives trains in one process, and there are {world_size()}; use "
                "OneForAllTrainer, which balances losses over all processes, or run the recipe with oneshot"
            )
        step, seen = self._place
        self.batch_data, self._place = batch_data, (global_step, seen + 1 if step == global_step else 0)
        self.subnets.begin(self._place)

    def step(
        self,
        loss: Tensor,
        outputs: Any = None,
        model: nn.Module | None = None,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        num_items_in_batch: Tensor | int | None = None,
        micro_batches: int = 1,
        step_batches: Sequence[Mapping[str, Any]] = (),
        **kwargs: Any,
    ) -> Tensor:
        """Add up the gradients of all subnets; return the largest one's loss, () fp32, whose backward does nothing.

        Args:
            loss: The largest subnet's, as the loop computed it; used where a micro-batch has nothing to learn from.
            outputs: Of the forward that gave ``loss``: its logits are the largest subnet's. None: it is run again.
            model: The model as wrapped for training. None: as it was given to the session.
            backward: Differentiates a loss.
            num_items_in_batch: Target tokens of the whole optimizer step. None: micro-batches weigh the same.
            micro_batches: Of an optimizer step.
            step_batches: All of them, by whose positions a distillation of all tokens weighs. None given: by targets.
            kwargs: What other modifiers may want.

        Raises:
            TrainingError: If DataParallel replicates the model, or a loss is not finite.
        """
        if isinstance(model, nn.DataParallel):
            raise TrainingError(
                "DataParallel, one process with several GPUs, cuts a batch in pieces that no subnet's losses fit; let "
                "the process see one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        positions = self.subnets.positions(self.batch_data)
        if len(positions.rows) == 0:
            return loss.detach().nan_to_num().requires_grad_()
        share = Share.even(1 / micro_batches)
        if num_items_in_batch is not None:
            share = Share.even(positions.num_targets / torch.as_tensor(num_items_in_batch).clamp(min=1))
            if self.subnets.options.distill_all_tokens and step_batches:
                distilled = sum(len(self.subnets.positions(batch).rows) for batch in step_batches)
                share = share._replace(distilled=len(positions.rows) / distilled)
        self.subnets.host.backward = backward
        inputs = {name: value for name, value in self.batch_data.items() if name != "labels"}
        logits = getattr(outputs, "logits", None)
        batch = MicroBatch(model or self.trained, inputs, positions, self._place, share)
        found = self.subnets.run(batch, logits)
        return found.detach().requires_grad_()
