"""Two processes (gloo) train to the same parameters as one that has all rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed_trials.py")
    subprocess.run([sys.executable, str(script), str(directory)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return directory


@pytest.mark.parametrize("case", ["smol-1", "smol-2", "none-1"])
def test_two_processes_train_as_one_with_all_rows(results: Path, case: str) -> None:
    one, first, second = (load_file(results / f"{case}-{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert first.pop("exchanges") == second.pop("exchanges") == STEPS  # once per optimizer step
    assert one.pop("exchanges") == 0
    for name, expected in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(
            first[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
