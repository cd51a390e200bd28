"""Two processes (gloo), by DDP or FSDP2, train to the same parameters as one that has all rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amoeba_plugin.elastic.checkpoint import load_elastic
from support.distributed_trials import MODES, SHAPE, STEPS

TESTS = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("distributed")  # one worker trains, and its results are looked at there


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.distributed_trials", str(directory)]
    subprocess.run(command, check=True, env=environment, cwd=TESTS, timeout=900)
    return directory


@pytest.mark.parametrize(("mode", "case"), [(mode, case) for mode in ("ddp", "fsdp") for case in MODES[mode]])
def test_two_processes_train_as_one_with_all_rows(results: Path, mode: str, case: str) -> None:
    one = load_file(results / f"{case}-one-0.safetensors")
    first, second = (load_file(results / f"{case}-{mode}-{rank}.safetensors") for rank in range(2))
    del one["exchanges"], one["evaluated"]
    for name, expected in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(
            first[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("mode", "case"), [(mode, case) for mode in ("ddp", "fsdp") for case in MODES[mode]])
def test_gradients_are_exchanged_once_per_optimizer_step(results: Path, mode: str, case: str) -> None:
    """Once for each sharded layer, whether the step's last subnet keeps it or not."""
    for rank in range(2):
        fewest, most = load_file(results / f"{case}-{mode}-{rank}.safetensors")["exchanges"].tolist()
        if case == "each":  # with every subnet: a layer that all keep 4 times
            assert STEPS < fewest < most == 4 * STEPS
        else:
            assert fewest == most == STEPS


def test_nothing_needs_a_number_of_processes_that_divides_it(results: Path) -> None:
    """Rows, and above, sharded, a vocabulary of 61 tokens and 3 experts."""
    first, second = (load_file(results / f"uneven-ddp-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(second[name], value) and value.isfinite().all() for name, value in first.items())


def test_a_last_micro_batch_without_a_target_exchanges_the_gradients_of_those_before(results: Path) -> None:
    """Sharded on one process, where no other would wait for it."""
    expected, found = (load_file(results / f"idle-{mode}-0.safetensors") for mode in ("one", "fsdp alone"))
    assert found["exchanges"].tolist() == [STEPS, STEPS]
    del expected["exchanges"], expected["logged"]  # what is logged counts micro-batches without a target
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_recipe_trains_on_several_processes_as_on_one(results: Path) -> None:
    one, two = (load_file(results / f"recipe-{mode}/adapter/adapter_model.safetensors") for mode in ("one", "ddp"))
    assert len(one) == len(two)
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-4)
    assert (results / "checkpoints-ddp/checkpoint-4").is_dir()
    assert not list(results.glob(".*"))


def test_a_sharded_model_is_evaluated_whole(results: Path) -> None:
    for case in MODES["ddp"]:
        expected, found = (load_file(results / f"{case}-{mode}-0.safetensors") for mode in ("ddp", "fsdp"))
        torch.testing.assert_close(found["evaluated"], expected["evaluated"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["smol", "lora", "none"])
@torch.no_grad()
def test_an_elastic_checkpoint_of_a_sharded_model_is_whole(results: Path, case: str) -> None:
    (expected, _), (found, _) = (load_elastic(results / f"{case}-{mode}") for mode in ("one", "fsdp"))
    tokens = torch.arange(12)[None]
    for shape in (str(found.space.largest), SHAPE):
        with expected.active(shape), found.active(shape):
            torch.testing.assert_close(found.model(tokens).logits, expected.model(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_sharded_training_goes_on_where_it_was(results: Path, kind: str) -> None:
    found = load_file(results / f"{kind}.safetensors")
    assert found.pop("equal")  # to the parameters of the training that was not interrupted
    saved = load_file(results / kind / "adapter/adapter_model.safetensors")
    found = {name.replace(".default", ""): value for name, value in found.items()}
    assert {name for name in saved if not name.endswith("draws")} == found.keys()  # how often noise was drawn
    for name, value in found.items():
        assert torch.equal(saved[name], value)


@pytest.mark.parametrize(
    ("what", "advice"),
    [
        ("version 1", "set fsdp_config={'version': 2}"),
        ("activation checkpointing", "use gradient_checkpointing=True"),
        ("layers together", "leave auto_wrap_policy and transformer_layer_cls_to_wrap out"),
        ("recipe", "use DDP, or OneForAllTrainer with FSDP2"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(results: Path, what: str, advice: str) -> None:
    assert advice in json.loads((results / "refused.json").read_text())[what]


def test_every_process_sees_a_gradient_that_is_not_finite_in_another(results: Path) -> None:
    found = json.loads((results / "refused.json").read_text())
    assert (found["gradient 1.0"], found["gradient inf"]) == (True, False)
