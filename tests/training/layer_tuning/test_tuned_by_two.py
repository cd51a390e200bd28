"""Two processes (gloo, DDP) tune to the same parameters as one that has all rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.distributed_trials import free_port
from support.models import require_close

TESTS = Path(__file__).parents[2]


def test_two_processes_tune_as_one(tmp_path: Path):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{}, *(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))]
    command = [sys.executable, "-m", "support.tuned_distributed", str(tmp_path / "found")]
    processes = [subprocess.Popen(command, cwd=TESTS, env=os.environ | rank) for rank in ranks]
    assert [process.wait(timeout=600) for process in processes] == [0, 0, 0]
    for kind in ("none", "lora"):
        one, first, second = (load_file(tmp_path / f"found-{kind}-{name}.safetensors") for name in ("one", 0, 1))
        for name, expected in one.items():
            assert torch.equal(first[name], second[name])
            require_close(first[name], expected, 2e-5)
