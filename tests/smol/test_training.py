"""Training under the conditions people train in: accumulation, offload, several processes, a quantized base."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_add_up_over_shapes(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model(router_noise=False).train()
    total: dict[str, Tensor] = {}
    for shape in ("4x1", "3x3/4", "2x1/2"):
        model.zero_grad()
        model.set_shape(shape)
        model(tokens).logits.pow(2).mean().backward()
        for name, grad in gradients(model).items():
            total[name] = total.get(name, torch.zeros_like(grad)) + grad
    model.zero_grad()
    for shape in ("4x1", "3x3/4", "2x1/2"):
        model.set_shape(shape)
        model(tokens).logits.pow(2).mean().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, total[name])


def test_training_lowers_the_loss_at_every_shape(base_model: Any, smol_config: Any, tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = get_peft_model(base_model(), smol_config(r=4)).train()
    router = model.base_model.router.weights("default")
    start = router.up_weight.clone()
    space = list(model.peft_config["default"].space)

    def losses() -> list[float]:
        model.eval()
        values = []
        for shape in space:
            model.set_shape(shape)
            values.append(model(tokens, labels=tokens).loss.item())
        model.train()
        return values

    before = losses()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(4):
        for shape in space:
            model.set_shape(shape)
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
    assert all(after < was for after, was in zip(losses(), before, strict=True))
    assert not torch.equal(router.up_weight, start)


def test_cpu_offload(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model()
    expected = []
    for shape in ("4x1", "2x1/2"):
        model.set_shape(shape)
        expected.append(model(tokens).logits)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.base_model.router.weights("default").down_weight.device.type == "meta"
    for shape, logits in zip(("4x1", "2x1/2"), expected, strict=True):
        model.set_shape(shape)
        assert torch.equal(model(tokens).logits, logits)


PROCESS = """
import sys, torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from amoeba_plugin.smol import SmolConfig

rank, size, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous{size}", rank=rank, world_size=size)
torch.manual_seed(0)
config = SmolConfig(r=2, num_layers=3, depths=[2, 3], widths=["1", "1/2"], target_modules=["0", "2"],
    init_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), config).double().train()
parallel = DistributedDataParallel(model)
data = torch.randn(4, 5, 4).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for shape in ("3x1", "2x1/2", "3x1/2"):
    model.set_shape(shape)
    optimizer.zero_grad()
    # the loss is a mean over equal shares, so the mean of the ranks' gradients is the gradient of all the data
    parallel(data.chunk(size)[rank].flatten(0, 1)).pow(2).mean().backward()
    optimizer.step()
torch.save({n: p.detach() for n, p in model.named_parameters() if "smol_" in n}, f"{directory}/{size}_{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for size in (1, 2):
        command = [sys.executable, "-c", PROCESS]
        processes = [subprocess.Popen([*command, str(rank), str(size), str(tmp_path)]) for rank in range(size)]
        assert [process.wait(timeout=240) for process in processes] == [0] * size
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert len(alone) == 2 * 2 + 6
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-9, atol=1e-9)
