"""What layer tuning may train: parameters by the layer or the exit that they belong to, frozen outside the window.

An optimizer is made with all of them, and what is outside the window is frozen afterwards: one made while some are
frozen would never train those (modelscope/ms-swift#10140).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.errors import TrainingError
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.windows import Window


@dataclass(frozen=True)
class Candidates:
    """Parameters that some step trains.

    Attributes:
        of_layers: By layer.
        of_exits: By the depth of the exit.
        of_all: Trained by every step: what all layers share, as SMOL's router.
    """

    of_layers: dict[int, list[nn.Parameter]]
    of_exits: dict[int, list[nn.Parameter]]
    of_all: list[nn.Parameter]

    def thaw(self) -> list[nn.Parameter]:
        """Let all of them require gradients, for an optimizer to be made; return them."""
        found = [*(each for of in (*self.of_layers.values(), *self.of_exits.values()) for each in of), *self.of_all]
        for parameter in found:
            parameter.requires_grad_(True)
        return found

    def freeze_outside(self, window: Window) -> list[nn.Parameter]:
        """Let those of a window require gradients alone; return the others, which keep none."""
        outside = []
        for inside, parameters in (
            *((layer in window, of) for layer, of in self.of_layers.items()),
            *((depth == window.depth, of) for depth, of in self.of_exits.items()),
        ):
            for parameter in parameters:
                parameter.requires_grad_(inside)
                if not inside:
                    parameter.grad = None
                    outside.append(parameter)
        return outside


def candidates_of(model: PreTrainedModel | PeftModel, exits: Exits, windows: Sequence[Window]) -> Candidates:
    """Find what may be trained, and freeze the rest for good.

    Of a model without an adapter that is every parameter of a layer in some window, and the exits' norms; embeddings
    and the head, which all exits share, stay. Of an adapter it is what requires a gradient.

    Raises:
        TrainingError: If there is nothing, an adapter trains what exits share or does not save their norms, or the
            model's own layers are to be trained for several exits that are not stacked.
    """
    if not isinstance(model, PeftModel):
        if not exits.stacked and len(exits.depths) > 1:
            raise TrainingError(
                "the layers' own parameters are trained in place, so that exits above see them: make the exits with "
                "stacked=True, take a single one, or put an adapter on the model"
            )
        _thaw_layers(model, exits)
    owners = {id(value): layer for layer, module in enumerate(exits.layers) for value in module.parameters()}
    of_layers: dict[int, list[nn.Parameter]] = {}
    of_exits = {depth: [value for value in exits.norm(depth).parameters() if value.requires_grad] for depth in
                exits.depths}  # fmt: skip
    norms = {id(value) for of in of_exits.values() for value in of}
    shared = {id(value) for part in _shared(exits) for value in part.parameters()}
    of_all = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in norms:
            continue
        layer = owners.get(id(parameter))
        if layer is None and id(parameter) in shared:
            raise TrainingError(f"the adapter trains {name}, which all exits share; leave it out of its configuration")
        if layer is None:
            of_all.append(parameter)
        elif any(layer in window for window in windows):
            of_layers.setdefault(layer, []).append(parameter)
        else:
            parameter.requires_grad_(False)
    _require_something(model, exits, of_layers, of_exits)
    return Candidates(of_layers, of_exits, of_all)


def _thaw_layers(model: PreTrainedModel, exits: Exits) -> None:
    model.requires_grad_(False)
    for part in (*exits.layers, *(exits.norm(depth) for depth in exits.depths)):
        for value in part.parameters():
            value.requires_grad_(value.is_floating_point())


def _shared(exits: Exits) -> list[nn.Module]:
    parts = (exits.model.get_input_embeddings(), exits.model.get_output_embeddings())
    return [part for part in parts if isinstance(part, nn.Module)]


def _require_something(
    model: nn.Module,
    exits: Exits,
    of_layers: dict[int, list[nn.Parameter]],
    of_exits: dict[int, list[nn.Parameter]],
) -> None:
    if not of_layers:
        raise TrainingError(
            "no parameter of a layer in any window requires a gradient; put an adapter on the model "
            "(get_peft_model), or load it in full precision"
        )
    unsaved = [depth for depth in exits.depths if depth < len(exits.layers) and not of_exits[depth]]
    if isinstance(model, PeftModel) and unsaved:
        raise TrainingError(
            f"the adapter does not hold the norms of the exits at {', '.join(map(str, unsaved))}; make the exits first "
            "and put them into its configuration: modules_to_save=exits.modules_to_save"
        )
