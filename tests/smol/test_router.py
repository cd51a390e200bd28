"""The router: noise, determinism, gradients, and what gradient checkpointing does to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from amoeba_plugin.errors import AdapterError, ShapeError
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol import ShapeRouter, SmolConfig
from amoeba_plugin.smol.router_weights import RouterWeights, shape_feature


def weights_of(model: PeftModel) -> RouterWeights:
    return model.base_model.router.weights("default")


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_feature_is_the_kept_layers_and_the_width() -> None:
    assert shape_feature([1, 2], 2, num_layers=4, num_widths=3).tolist() == [0, 1, 1, 0, 0, 0, 1]


def test_default_shape_is_the_largest(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model()
    assert str(model.shape) == "4x1"
    feature = weights_of(model).state.feature
    model.set_shape("4x1")
    assert torch.equal(weights_of(model).state.feature, feature)


def test_kept_layers_come_from_the_call_the_config_or_the_default(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model(kept_layers={"3": [0, 1, 3]})
    for kept_layers, shape, expected in [
        (None, "3x1/2", [1, 1, 0, 1, 0, 0, 1]),
        ([1, 2, 3], "3x1/2", [0, 1, 1, 1, 0, 0, 1]),
        (None, SubnetShape.parse("2x3/4"), [1, 0, 0, 1, 0, 1, 0]),
    ]:
        model.set_shape(shape, kept_layers)
        assert weights_of(model).state.feature.tolist() == expected
        assert model.shape == SubnetShape.parse(shape)


@pytest.mark.parametrize(
    ("shape", "kept_layers", "message"),
    [
        ("1x1", None, r"shape 1x1 is outside the space depths \{4, 3, 2\} x widths \{1, 3/4, 1/2\}"),
        ("4x7/8", None, "shape 4x7/8 is outside the space"),
        ("big", None, "'big' is not a subnet shape"),
        ("2x1", [0, 1, 2], "shape 2x1: depth 2 keeps 2 layers, but kept_layers lists 3"),
        ("2x1", [0, 4], "names layer 4, but the model has layers 0 to 3"),
    ],
)
def test_shapes_outside_the_space_are_refused(
    smol_model: Callable[..., PeftModel], shape: str, kept_layers: list[int] | None, message: str
) -> None:
    model = smol_model()
    model.set_shape("3x1/2")
    with pytest.raises(ShapeError, match=message):
        model.set_shape(shape, kept_layers)
    assert str(model.shape) == "3x1/2"


def test_routing_sums_to_one_over_top_k(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model(num_experts=6, top_k=3)
    for shape in model.peft_config["default"].space:
        model.set_shape(shape)
        mixture = model.routing()
        assert mixture.shape == (6,)
        assert (mixture > 0).sum() == 3
        assert mixture.sum().item() == pytest.approx(1)
    with pytest.raises(AdapterError, match=r"there is no adapter 'other'; the model has \['default'\]"):
        model.routing("other")


def test_temperature_and_nonlinearity() -> None:
    torch.manual_seed(0)
    fields = dict(num_layers=4, depths=[2, 4], widths=["1"], num_experts=4, router_noise=False)
    sharp = RouterWeights(SmolConfig(router_temperature=0.5, router_nonlinearity="relu", **fields))
    smooth = RouterWeights(SmolConfig(router_temperature=2.0, router_nonlinearity="relu", **fields))
    smooth.load_state_dict(sharp.state_dict())
    # softmax(z / T): the log odds scale with 1 / T
    odds = [torch.log(gates[0] / gates[1]) for gates, _ in (sharp(), smooth())]
    torch.testing.assert_close(odds[0], 4 * odds[1])
    f = sharp.state.feature
    hidden = torch.relu(sharp.down_weight @ f + sharp.down_bias)
    torch.testing.assert_close(sharp.logits(f, None), sharp.up_weight @ hidden + sharp.up_bias)


@pytest.mark.parametrize(
    ("experts", "temperature", "activation"), [(3, 1.0, "none"), (7, 0.2, "relu"), (2, 1.0, "none")]
)
def test_each_width_may_start_with_experts_of_its_own(experts: int, temperature: float, activation: str) -> None:
    config = SmolConfig(
        num_layers=6, depths=[3, 5, 6], widths=["1", "7/8", "3/4"], num_experts=experts, top_k=experts,
        router_noise=False, router_init="widths", router_temperature=temperature, router_nonlinearity=activation,
    )  # fmt: skip
    # what is random in the start is not what decides: the mean over many starts, the owners by a loop of its own
    starts = [_mixtures(RouterWeights(config)) for _ in range(50)]
    for shape in config.space:
        index = config.space.widths.index(shape.width)
        owners = [expert for expert in range(experts) if expert % 3 == index]
        share = sum(float(start[str(shape)][owners].sum()) for start in starts) / len(starts)
        assert share > 0.9 if owners else share == 0  # two experts: the third width has none of its own


def test_a_start_at_widths_still_learns() -> None:
    fields = dict(num_layers=4, depths=[2, 4], widths=["1", "3/4"], num_experts=2, router_noise=False)
    router = RouterWeights(SmolConfig(router_init="widths", **fields))
    router.state = router.state_at("2x3/4")
    gates, indices = router()
    (gates[indices == 0]).sum().backward()
    assert router.up_weight.grad is not None
    assert router.up_weight.grad.abs().sum() > 0


def _mixtures(router: RouterWeights) -> dict[str, Tensor]:
    mixtures = {}
    for shape in router.config.space:
        router.state = router.state_at(shape)
        gates, indices = router(deterministic=True)
        mixtures[str(shape)] = torch.zeros(router.config.num_experts).scatter(0, indices, gates.detach())
    return mixtures


def test_noise_is_in_training_only_and_seeded(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    def training_run(seed: int) -> list[Tensor]:
        model = smol_model(router_seed=seed).train()
        logits = []
        for _ in range(3):
            torch.rand(5)  # the global generator is not the router's
            logits.append(model(tokens).logits.detach())
        return logits

    first, again, other = training_run(0), training_run(0), training_run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])

    model = smol_model()
    model.train()
    model.set_shape("3x1")
    assert weights_of(model).state.noise.abs().min() > 0
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert torch.equal(model.routing(), model.routing())


def test_one_noise_for_all_layers_of_a_forward(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model().train()
    seen = []
    model.base_model.router.register_forward_hook(lambda module, args, output: seen.append(output[0].tolist()))
    model(tokens)
    assert len(seen) == 28
    assert all(gates == seen[0] for gates in seen)
    model(tokens)
    assert seen[28] != seen[0]


def test_without_noise_its_weights_do_not_exist(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model(router_noise=False).train()
    assert not [name for name, _ in model.named_parameters() if "noise" in name]
    assert torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("combination", ["factors", "outputs"])
def test_router_gradient_equals_finite_differences(combination: str) -> None:
    torch.manual_seed(0)
    config = SmolConfig(
        r=2,
        num_layers=3,
        depths=[2, 3],
        num_experts=4,
        top_k=3,
        combination=combination,
        target_modules=["0"],
        init_weights=False,
        router_noise=False,
    )
    model = get_peft_model(nn.Sequential(nn.Linear(5, 6)).double(), config, autocast_adapter_dtype=False)
    model = model.double().set_shape("2x1") or model
    x, target = torch.randn(4, 5).double(), torch.randn(4, 6).double()
    weights = model.base_model.router.weights("default")

    def loss_at(flat: Tensor) -> Tensor:
        names = ["down_weight", "down_bias", "up_weight", "up_bias"]
        sizes = [getattr(weights, name).numel() for name in names]
        values = {
            f"base_model.model.shape_router.smol_router.default.{name}": part.view_as(getattr(weights, name))
            for name, part in zip(names, flat.split(sizes), strict=True)
        }
        return (torch.func.functional_call(model, values, (x,)) - target).pow(2).mean()

    start = torch.cat(
        [p.detach().flatten() for p in (weights.down_weight, weights.down_bias, weights.up_weight, weights.up_bias)]
    )
    assert torch.autograd.gradcheck(loss_at, (start.requires_grad_(),))


def test_gradients_reach_every_adapter_parameter(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model().train()
    for shape in model.peft_config["default"].space:
        model.set_shape(shape)
        model(tokens, labels=tokens).loss.backward()
    grads = gradients(model)
    assert set(grads) == {name for name, _ in model.named_parameters() if "smol_" in name}
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    assert [p for name, p in model.named_parameters() if p.requires_grad and "smol_" not in name] == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(
    smol_model: Callable[..., PeftModel], tokens: Tensor, use_reentrant: bool
) -> None:
    def run(checkpointing: bool) -> dict[str, Tensor]:
        model = smol_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        for shape in ("4x1", "3x1/2", "3x1/2", "2x3/4"):
            model.set_shape(shape)
            model(tokens, labels=tokens).loss.backward()
        return gradients(model)

    plain, checkpointed = run(False), run(True)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "context_fn"])
def test_several_shapes_before_one_backward(smol_model: Callable[..., PeftModel], tokens: Tensor, way: str) -> None:
    def run(checkpointing: bool) -> dict[str, Tensor]:
        model = smol_model().train()
        if checkpointing:
            kwargs: dict[str, Any] = {"use_reentrant": way == "reentrant"}
            if way == "context_fn":
                kwargs["context_fn"] = model.base_model.router.checkpoint_context_fn
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        losses = []
        for shape in ("4x1", "3x1/2", "2x3/4", "2x3/4"):  # the last two differ in their noise alone
            model.set_shape(shape)
            losses.append(model(tokens, labels=tokens).loss)
        sum(losses).backward()
        assert str(model.shape) == "2x3/4"
        return gradients(model)

    plain, checkpointed = run(False), run(True)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-7)


def test_a_step_changes_the_routing_without_set_shape(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model()
    before = model.routing()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not torch.equal(model.routing(), before)


def test_a_sequential_root_passes_through_the_router() -> None:
    router = ShapeRouter()
    x = torch.randn(2)
    assert router(x) is x
    assert router.weight is None
    assert router.bias is None
    assert router.get_base_layer() is router
    assert router.supports_lora_conversion() is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_routes_in_fp32(base_model: Any, smol_config: Any, tokens: Tensor, dtype: torch.dtype) -> None:
    model = get_peft_model(base_model().to(dtype), smol_config(init_weights=False)).train()
    assert {p.dtype for name, p in model.named_parameters() if "smol_" in name} == {torch.float32}
    expected = model.routing()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.routing(), expected)
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in gradients(model).values())

    narrow = get_peft_model(base_model().to(dtype), smol_config(), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in narrow.named_parameters() if "smol_" in name} == {dtype}
    assert narrow.routing().dtype == torch.float32
