"""Two processes that see half of the calibration data each know what one that sees all of it knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from amoeba_plugin.runtime.ranks import sum_over_ranks

MEASURE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import distributed
sys.path.insert(0, sys.argv[1])
from support.batches import make_random_batches
from support.models import make_tiny_model
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.depth.layer_importance import angular_distances, block_influence
from amoeba_plugin.selection.depth.layer_importance import most_sensitive_layers, scores_without
from amoeba_plugin.selection.objectives import Objective, PerTokenLoss
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.width.ranking import coupled_parameters
root, rank, ranks = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if ranks > 1:
    distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=ranks)
model, adapter = make_tiny_model("llama", layers=3), architecture_for("llama")
batches = make_random_batches(5, lengths=(12, 7))[rank::ranks]  # three and two of them
found = {"influence": torch.tensor(block_influence(model, adapter, batches), dtype=torch.float64)}
found["angles"] = angular_distances(model, adapter, batches)
for key, stats in collect_statistics(model, adapter, batches, progress=False).items():
    found |= {f"{key}.mean": stats.mean, f"{key}.variance": stats.variance, f"{key}.tokens": torch.tensor(stats.tokens)}
found |= loss_gradients(model, coupled_parameters(model, adapter), batches, progress=False)
found["without"] = torch.tensor(
    [[score.value, score.loss] for score in scores_without(model, adapter, PerTokenLoss(), batches, progress=False)],
    dtype=torch.float64)
alike = make_random_batches(3, lengths=(12, 7))  # as ranks have them whose loader does not split the data
found["shared"] = torch.tensor(
    [score.value for score in scores_without(model, adapter, PerTokenLoss(), alike, progress=False)],
    dtype=torch.float64)
found["anchors"] = torch.tensor(most_sensitive_layers(model, adapter, PerTokenLoss(), batches, 2, progress=False))


class Whole(PerTokenLoss):
    seen = 0

    def measure(self, model, batches):
        self.seen += len(batches)
        return Objective.measure(self, model, batches)


whole = Whole()
found["whole"] = torch.tensor(
    [score.value for score in scores_without(model, adapter, whole, alike, progress=False)], dtype=torch.float64)
assert whole.seen == 3 * 3
save_file(found, root / f"{ranks}.{rank}.safetensors")
"""


def test_two_ranks_know_what_one_process_knows(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", MEASURE, str(Path(__file__).parent.parent), str(tmp_path)]
    runs = [subprocess.Popen([*arguments, rank, ranks]) for rank, ranks in (("0", "1"), ("0", "2"), ("1", "2"))]
    assert [run.wait(timeout=500) for run in runs] == [0, 0, 0]
    one, *two = (load_file(tmp_path / f"{name}.safetensors") for name in ("1.0", "2.0", "2.1"))
    assert one["0.mlp.tokens"].item() == 5 * (12 + 7)
    for found in two:
        assert found.keys() == one.keys()
        for name, expected in one.items():
            torch.testing.assert_close(
                found[name], expected, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text
            )
            if expected.dtype == torch.float64:  # statistics; gradients are fp32
                torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(two[0][name], two[1][name]) for name in one)  # so that both decide the same


def test_one_process_has_what_it_has() -> None:
    values = torch.tensor([1.0, 2.0])
    assert sum_over_ranks(values) is values
