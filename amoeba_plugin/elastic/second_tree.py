"""A second tree of modules on the weights of an elastic model: both are elastic models, each at a shape of its own.

A small shape can then draft for a larger one, or a few layers read what all will read, without a switch in between.
"""

from __future__ import annotations

import copy
from itertools import chain

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArchitectureError


def second_tree(live: ElasticModel) -> ElasticModel:
    """Return an elastic model of other modules on the same tensors, adapter included, at the shape that is active now.

    Modules, configuration, active sizes, layers and routing are its own; parameters and buffers are the same objects,
    so that what changes one is seen by both. It is for inference: a training should know one tree alone. Listeners that
    were made by others are copied where they are methods or partials of what belongs to the model; plain functions are
    called by both.

    Raises:
        ArchitectureError: If weights are streamed from a disk: there is nothing to be shared.
    """
    if live.streamed is not None:
        raise ArchitectureError("the model's weights are streamed from its files; load it whole to share them")
    shape = live.shape
    with live.active(live.space.largest) as model:  # every layer and sublayer is in the model then
        memo = {id(each): each for each in chain(model.parameters(), model.buffers(), [live.strategy])}
        second = copy.deepcopy(live, memo)
    second.set_shape(shape)
    return second
