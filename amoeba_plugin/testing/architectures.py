"""What every architecture adapter must satisfy, as tests that an adapter's author subclasses.

It is part of the package, not of its tests, so that a plugin's tests can import it; it needs pytest to run, not to be
imported. A plugin writes::

    class TestMine(ArchitectureConformance):
        config = {"model_type": "mine", "num_hidden_layers": 4, "hidden_size": 96, ...}

and gets: at every shape of a space, elastic == extracted == reloaded by transformers alone, in logits, whole and step
by step with a cache; configuration fields against tensors; the largest shape against the untouched model; adapters
folded in; and that leaving a shape restores the model. Norms, biases and everything else are random: defaults of one
and zero hide wrong indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.adapter import ArchitectureAdapter, copy_config, group_key
from amoeba_plugin.models.kept import PARTS
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.compat import cache_name
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.testing.random_models import (
    WIDTHS,
    attach_random_smol,
    random_model,
    random_repairs,
    random_strategy,
)
from amoeba_plugin.testing.reload import reload_plainly

TOLERANCE = 1e-4  # of logits, fp32


class ArchitectureConformance:
    """Tests of one architecture; subclass it, with a name that your test runner collects.

    Attributes:
        config: ``model_type`` and the fields of a tiny model: four layers; units of every group in multiples of four;
            whatever lists one value per layer with values that differ.
        tokens: Positions of the test's input; more than a sliding window, if there is one.
    """

    config: ClassVar[Mapping[str, Any]]
    tokens: ClassVar[int] = 12

    def model(self) -> PreTrainedModel:
        """Return the tiny model; the same at every call."""
        return random_model(self.config)

    def elastic(self, adapted: bool = False, bias_compensation: bool = False) -> ElasticModel:
        """Return it elastic, on request with a SMOL adapter whose every parameter is random."""
        model = self.model()
        elastic = ElasticModel(model, random_strategy(model, bias_compensation=bias_compensation))
        if adapted:
            attach_random_smol(elastic)
        return elastic

    def input(self) -> Tensor:
        """Return (2, positions) random tokens, the same at every call."""
        high = self.config["vocab_size"]
        return torch.randint(3, high, (2, self.tokens), generator=torch.Generator().manual_seed(5))

    def logits(self, model: nn.Module) -> Tensor:
        """Return a model's logits of :meth:`input`, (2, positions, vocabulary), without a cache."""
        with torch.no_grad():
            found: Tensor = model(self.input(), use_cache=False).logits
        return found

    def test_reordering_changes_no_output(self) -> None:
        """The largest shape is the untouched model, though every group's channels moved."""
        model = self.model()
        before, weights = self.logits(model), {name: each.clone() for name, each in model.state_dict().items()}
        ElasticModel(model, random_strategy(model))
        for name, weight in model.state_dict().items():
            if name.endswith(tuple(f"{group.consumer.path}.{group.consumer.parameter}" for group in self._groups())):
                assert not torch.equal(weight, weights[name]), name
        _close(self.logits(model), before, "the largest shape")

    def test_leaving_a_shape_restores_model_and_configuration(self) -> None:
        """After every shape the model computes bit for bit what it did, on the same memory, as ordinary modules."""
        model = self.model()
        keys, classes = set(model.state_dict()), [type(module) for module in model.modules()]
        config = model.config.to_dict()
        elastic = ElasticModel(model, random_strategy(model))
        before = self.logits(model)
        memory = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        for shape in elastic.space:
            with elastic.active(shape):
                assert shape == elastic.space.largest or not torch.equal(self.logits(model), before), str(shape)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == memory
        assert torch.equal(self.logits(model), before)
        assert model.config.to_dict() == config
        elastic.release()
        assert set(model.state_dict()) == keys
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(self.logits(model), before)

    def test_a_narrow_shape_is_the_whole_model_with_masks(self) -> None:
        """Independent of reordering and slicing: the consumer's columns of all units that go are zero."""
        masked = self.model()
        adapter, strategy, width = architecture_for(masked.config.model_type), random_strategy(masked), WIDTHS[1]
        groups = adapter.channel_groups(masked.config)
        if any(group.norms for group in groups):
            return  # norms over the channels kept: masks compute something else, see ChannelGroup.norms
        with torch.no_grad():
            for index, layer in enumerate(adapter.layers(masked)):
                for group in groups:
                    key = group_key(index, group)
                    gone = group.consumer.channels(strategy.width.order[key][strategy.width.units[width][key] :])
                    group.consumer.weight(layer)[:, gone] = 0
        elastic = self.elastic()
        with elastic.active(f"4x{width}") as model:
            _close(self.logits(model), self.logits(masked), f"4x{width}")

    def test_a_sublayer_that_goes_is_one_that_ends_in_zeros(self) -> None:
        """Attention or MLP of a layer taken out, against a model in which its output projection is zero; or refused."""
        model, adapter = self.model(), architecture_for(self.config["model_type"])
        try:
            sublayers = adapter.sublayers(model.config)
        except ArchitectureError as refusal:
            if "granularity: layer" in str(refusal):
                return
            raise
        before, stand_ins = self.logits(model), StandIns(sublayers, tuple(adapter.layers(model)))
        for index, part in enumerate(PARTS):
            zeroed = self.model()
            parameters = dict(adapter.layers(zeroed)[index].named_parameters())
            ends = [parameters[name] for name in sublayers[part].outputs if name in parameters]
            assert ends, f"{part}: none of {sublayers[part].outputs} is there"
            with torch.no_grad():
                for parameter in ends:
                    parameter.zero_()
            with stand_ins.without({index: part}):
                _close(self.logits(model), self.logits(zeroed), f"without {index}.{part}")
        assert torch.equal(self.logits(model), before)

    def test_cached_decoding_agrees_step_by_step(self) -> None:
        """At every shape, logits of one token after the other with a cache are those of all at once."""
        elastic, tokens = self.elastic(), self.input()
        for shape in elastic.space:
            with elastic.active(shape) as model, torch.no_grad():
                expected, cached, name = self.logits(model), None, cache_name(model)
                for position in range(self.tokens):
                    step = model(tokens[:, position : position + 1], use_cache=True, **{name: cached})
                    cached = getattr(step, name)
                    _close(step.logits[:, 0], expected[:, position], f"{shape}, position {position}")

    def test_every_shape_is_a_checkpoint_that_transformers_loads(self, tmp_path: Path) -> None:
        """Elastic == extracted == reloaded, and the configuration states the sizes of the tensors."""
        elastic = self.elastic()
        expected = {}
        for shape in elastic.space:
            name = str(shape).replace("/", "_")
            with elastic.active(shape) as model:
                expected[name] = self.logits(model)
            subnet = extract(elastic, shape)
            _close(self.logits(subnet), expected[name], f"extracted {shape}")
            units = dict(elastic.plan.sizes(shape).units[0])
            require_stated_sizes(subnet, elastic.adapter, len(elastic.kept_layers(shape)), units)
            self.check_subnet(subnet, elastic.kept_layers(shape))
            subnet.save_pretrained(tmp_path / name)
        found = reload_plainly(tmp_path, self.input())
        for name, logits in expected.items():
            _close(found[name], logits, f"reloaded {name}")
            _close(found[f"{name}.cached"], logits, f"reloaded {name}, with a cache")

    def check_subnet(self, subnet: PreTrainedModel, kept: tuple[int, ...]) -> None:
        """Check what is particular to an architecture: to be extended with fields that list one value per layer."""

    def test_an_adapter_is_folded_into_every_shape(self) -> None:
        """With a SMOL adapter on every linear, elastic == extracted."""
        elastic = self.elastic(adapted=True)
        plain = self.elastic()
        for shape in elastic.space:
            with elastic.active(shape) as model, plain.active(shape) as bare:
                expected = self.logits(model)
                assert (expected - self.logits(bare)).abs().max() > TOLERANCE, "the adapter does nothing"
            _close(self.logits(extract(elastic, shape)), expected, str(shape))

    def test_bias_compensation_is_stored_or_refused(self) -> None:
        """Never dropped: either the extracted subnet has it, or an error says what to do."""
        bare = self.elastic()
        try:
            elastic = self.elastic(bias_compensation=True)
            with elastic.active("3x1/2") as model, bare.active("3x1/2") as without:
                expected = self.logits(model)
                assert (expected - self.logits(without)).abs().max() > TOLERANCE, "compensation does nothing"
            subnet = extract(elastic, "3x1/2")
        except ArchitectureError as refusal:
            if "bias_compensation: false" in str(refusal):
                return
            raise
        _close(self.logits(subnet), expected, "extracted with compensation")

    def test_the_mlp_is_added_to_the_residual_stream_as_stated(self) -> None:
        """What a change of its last linear changes behind the layer, against that linear's own output."""
        model = self.model()
        adapter = architecture_for(model.config.model_type)
        share = adapter.residual_share(model.config)
        if share is None:
            return
        (group,) = (group for group in self._groups() if group.name == "mlp")
        layer = adapter.layers(model)[1]
        linear, weight = layer.get_submodule(group.consumer.path), group.consumer.weight(layer)
        found: dict[str, list[Tensor]] = {"neurons": [], "states": []}
        handles = [
            linear.register_forward_pre_hook(lambda _, args: found["neurons"].append(args[0])),
            layer.register_forward_hook(
                lambda _, args, output: found["states"].append(output if isinstance(output, Tensor) else output[0])
            ),
        ]
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)) * 0.1
        self.logits(model)
        with torch.no_grad():
            weight.add_(change)
        self.logits(model)
        for handle in handles:
            handle.remove()
        before, after = found["states"]
        expected = share * (found["neurons"][0] @ change.mT)
        _close((after - before).view_as(expected), expected, "added to the residual stream")

    def test_repaired_weights_take_the_place_of_columns(self) -> None:
        """At every shape: a model with those weights on the channels kept, and zeros on the others; and extracted."""
        model, groups = self.model(), self._groups()
        strategy = replace(random_strategy(model), repairs=random_repairs(model, random_strategy(model)))
        elastic = ElasticModel(model, strategy)
        largest = self.logits(model)
        for adapted in (False, True):
            if adapted:
                attach_random_smol(elastic)
            for shape in elastic.space:
                with elastic.active(shape) as active:
                    found = self.logits(active)
                if not adapted and not any(group.norms for group in groups):
                    masked = self._repaired_by_hand(strategy, shape)
                    _close(found, self.logits(masked), str(shape))
                _close(self.logits(extract(elastic, shape)), found, f"extracted {shape}")
            if not adapted:
                assert torch.equal(self.logits(model), largest), "a shape is left behind"

    def _repaired_by_hand(self, strategy: SubnetStrategy, shape: SubnetShape) -> PreTrainedModel:
        """Return the model with masks, its channels in their original order, whose consumers have repaired weights."""
        model, places = self.model(), strategy.repairs.weights
        adapter, held = architecture_for(model.config.model_type), dict[str, Tensor]()
        for place in ((None, shape.width), (shape.depth, shape.width)):
            held |= places.get(place, {})
        layers, config = list(adapter.layers(model)), copy_config(model.config)
        with torch.no_grad():
            for index, group in itertools.product(range(4), adapter.channel_groups(model.config)):
                key = group_key(index, group)
                if key in held:
                    kept = group.consumer.channels(strategy.width.order[key])[: held[key].shape[1]]
                    group.consumer.weight(layers[index]).zero_()[:, kept] = held[key]
        kept_layers = strategy.depth.kept[shape.depth]
        adapter.set_layers(model, [layers[index] for index in kept_layers], kept_layers, config)
        return model

    def _groups(self) -> tuple[Any, ...]:
        model_type = self.config["model_type"]
        fields = {name: value for name, value in self.config.items() if name != "model_type"}
        return architecture_for(model_type).channel_groups(AutoConfig.for_model(model_type, **fields))


def require_stated_sizes(
    subnet: PreTrainedModel, adapter: ArchitectureAdapter, depth: int, units: Mapping[str, int]
) -> None:
    """Check that a subnet's configuration says what its tensors are: equal outputs alone can hide a wrong field.

    Raises:
        AssertionError: If it does not.
    """
    layers, config = adapter.layers(subnet), subnet.config
    assert config.num_hidden_layers == len(layers) == depth
    for name in adapter.per_layer_fields:
        values = getattr(config, name, None)
        assert values is None or len(values) == depth, name
    for group in adapter.channel_groups(config):
        assert group.units == units[group.name], group.name
        for position, layer in enumerate(layers):
            where = f"layer {position}, {group.name}"
            assert group.consumer.weight(layer).shape[-1] == group.channels, where
            rows: dict[str, int] = {}
            for axis in (*group.producers, *group.norms):
                rows[axis.path] = rows.get(axis.path, 0) + group.units * axis.channels_per_unit
            for axis in (*group.producers, *group.norms):
                assert len(axis.weight(layer)) == rows[axis.path], f"{where}: {axis.path}"
    indices = [
        (position, vars(module)["layer_idx"])
        for position, layer in enumerate(layers)
        for module in layer.modules()
        if "layer_idx" in vars(module)
    ]
    assert all(position == index for position, index in indices), indices


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0, msg=lambda text: f"{what}: {text}")
