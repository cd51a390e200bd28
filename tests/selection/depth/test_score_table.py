"""A search that is killed goes on where it was, and ranks that share the data out find the same."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.runtime.ranks import from_first_rank
from amoeba_plugin.selection.depth.score_table import NAMES, MeasuredTable
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, Objective, Perplexity, PerTokenLoss, Score
from support.depth_search import searched
from support.forked import forked
from support.packed_linears import pack
from support.small_disk import small_disk

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]


def search(
    model: PreTrainedModel, batches: list[Batch], directory: Path | None, objective: Objective | None = None
) -> DepthStrategy:
    return searched(
        model, architecture_for("llama"), objective or PerTokenLoss(), batches,
        min_depth=2, exchanges=1, resume_dir=directory, progress=False,
    )  # fmt: skip


def test_a_disk_that_fills_is_named_and_the_scores_before_stay(tmp_path: Path) -> None:
    def table() -> MeasuredTable:
        return MeasuredTable.resumed(lambda sets: [Score(1.0, 2.0) for _ in sets], {"model": "m"}, disk / "scores")

    disk, asked = tmp_path / "disk", 0
    with small_disk(disk, 16), pytest.raises(ArtifactError, match=f"disk of {disk}/scores is full; free space"):
        for asked in range(1000):
            table()([frozenset([asked])])
            assert len(table().scores) == asked + 1
    assert asked > 10
    with small_disk(disk, 16):
        first = table()
        with pytest.raises(ArtifactError, match="is full"):
            first([frozenset([number]) for number in range(1000)])
        assert not table().scores


def stopping(after: int, stop: Callable[[], object]) -> Callable[..., Tensor]:
    """Return an ``observe`` that stops, by whatever means, after some calls."""
    observe, calls = PerTokenLoss.observe, 0

    def stopped(self: PerTokenLoss, model: PreTrainedModel, batch: Batch) -> Tensor:
        nonlocal calls
        if calls == after:
            stop()
        calls += 1
        return observe(self, model, batch)

    return stopped


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_search(model: PreTrainedModel, batches: list[Batch], directory: Path, after: int) -> None:
    torch.set_num_threads(1)
    PerTokenLoss.observe = stopping(after, kill)  # type: ignore[method-assign]  # the process is our own
    search(model, batches, directory)


def known(directory: Path) -> int:
    path = directory / NAMES["layer"]
    return len(json.loads(path.read_bytes())["scores"]) if path.exists() else 0


@pytest.mark.parametrize(("after", "sets"), [(0, 0), (2, 1), (9, 4), (33, 15)])
@pytest.mark.parametrize("by", ["an exception", "SIGKILL"])
def test_a_search_goes_on_where_it_was_stopped(
    tiny_model: TinyModel,
    random_batches: RandomBatches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    after: int,
    sets: int,
) -> None:
    model, batches = tiny_model("llama", layers=6), random_batches(2)
    wanted = search(model, batches, None)
    assert wanted.search["measured"] == 25
    if by == "SIGKILL":
        process = forked(killed_search, model, batches, tmp_path, after)
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PerTokenLoss, "observe", stopping(after, interrupt))
            search(model, batches, tmp_path)
    assert known(tmp_path) == sets  # whole steps
    assert not list(tmp_path.glob(".*"))
    resumed = search(model, batches, tmp_path)
    assert resumed == wanted
    assert resumed.search["measured"] == 25 - sets
    again = search(model, batches, tmp_path)
    assert again == wanted
    assert again.search["measured"] == again.search["layer_forwards"] == 0


def test_the_table_holds_the_scores_of_models_without_these_layers(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path
) -> None:
    model, batches = tiny_model("llama", layers=6), random_batches(2, lengths=(12, 7))
    search(model, batches, tmp_path)
    entries = json.loads((tmp_path / NAMES["layer"]).read_bytes())["scores"]
    assert len(entries) == 25
    for entry in entries:
        subnet = copy.deepcopy(model)
        kept = [index for index in range(6) if index not in entry["removed"]]
        subnet.model.layers = nn.ModuleList([subnet.model.layers[index] for index in kept])
        subnet.config.num_hidden_layers = len(kept)
        assert PerTokenLoss().measure(subnet, batches).value == pytest.approx(entry["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("model", "holds the scores of another search: model is .*, there it is .*Resume with the same model"),
        ("data", "data is .*, there it is"),
        ("objective", "objective is perplexity, there it is loss"),
        ("dtype", "dtype is torch.bfloat16, there it is torch.float32"),
        ("damaged", "is damaged, or no table of a depth search"),
        ("foreign", "is damaged, or no table of a depth search"),
        ("version", "format amoeba_plugin.DepthSearch, version 2"),
    ],
)
def test_another_search_s_table_is_refused(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path, what: str, message: str
) -> None:
    model, batches, objective, path = tiny_model("llama"), random_batches(), PerTokenLoss(), tmp_path / NAMES["layer"]
    search(model, batches, tmp_path)
    if what == "model":
        model = tiny_model("llama", seed=1)
    elif what == "data":
        batches[1]["labels"][0, 3] = -100
    elif what == "objective":
        objective = Perplexity()
    elif what == "dtype":
        model = model.to(torch.bfloat16)
    elif what == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        document = json.loads(path.read_bytes())
        path.write_text(json.dumps(document | ({"version": 2} if what == "version" else {"format": "other"})))
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=message):
        search(model, batches, tmp_path, objective)
    assert path.read_bytes() == before


def test_a_table_of_an_older_version_is_resumed(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path
) -> None:
    model, batches = tiny_model("llama"), random_batches()
    found = search(model, batches, tmp_path)
    document = json.loads((tmp_path / NAMES["layer"]).read_bytes())
    assert len(document["model"]) == 64  # one digest, as it always was
    assert document["model"] == model_fingerprint(model, architecture_for("llama")).partition(".")[0]
    again = search(model, batches, tmp_path)
    assert again == found
    assert again.search["measured"] == 0


def test_a_table_of_the_same_model_quantized_otherwise_is_refused(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path
) -> None:
    batches, model = random_batches(), pack(tiny_model("llama"))
    found = search(model, batches, tmp_path)
    assert search(pack(tiny_model("llama")), batches, tmp_path) == found
    model.config.quantization_config = {"quant_method": "packed", "bits": 4}
    with pytest.raises(ArtifactError, match='model is {"bits": 4, .*there it is {"quant_method'):
        search(model, batches, tmp_path)


def test_a_table_serves_other_depths_and_beams_too(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path
) -> None:
    model, batches, adapter = tiny_model("llama", layers=6), random_batches(), architecture_for("llama")
    search(model, batches, tmp_path)
    options = {"min_depth": 3, "beam": 2, "progress": False}
    found = searched(model, adapter, PerTokenLoss(), batches, resume_dir=tmp_path, **options)
    fresh = searched(model, adapter, PerTokenLoss(), batches, **options)
    assert found == fresh
    assert found.search["measured"] < fresh.search["measured"]


def test_scores_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    scores = {frozenset({1}): Score(math.nan, 2.0), frozenset({0, 2}): Score(math.inf, -math.inf)}
    table = MeasuredTable.resumed(lambda sets: [scores[removed] for removed in sets], {"model": "m"}, tmp_path)
    table(list(scores))
    again = MeasuredTable.resumed(lambda sets: [], {"model": "m"}, tmp_path).scores
    assert repr(again) == repr(scores)  # NaN is not equal to itself


def sharded_search(
    rank: int, ranks: int, model: PreTrainedModel, batches: list[Batch], directory: Path, objective: Objective
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=ranks)
    observed = 0

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal observed
        observed += len(args[0])

    model.model.layers[5].mlp.register_forward_pre_hook(count)
    try:
        found = search(model, batches, directory if rank == 0 else directory / "other disk", objective)
        assert from_first_rank(b"abc" if rank == 0 else b"no") == b"abc"
        assert from_first_rank(None) is None
        kept = {str(depth): list(layers) for depth, layers in found.kept.items()}
        metric = {str(depth): value for depth, value in found.metric.items()}
        document = {"kept": kept, "metric": metric, "rows": observed, "measured": found.search["measured"]}
        (directory / f"{rank}.json").write_text(json.dumps(document))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("split", ["by us", "by the loader", "one batch for two ranks"])
def test_ranks_share_the_data_and_agree(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path, split: str
) -> None:
    count = 1 if split == "one batch for two ranks" else 5
    model, batches = tiny_model("llama", layers=6), random_batches(count, 3, 12, lengths=(12, 5, 9))
    for number, batch in enumerate(batches):  # questions straddle batches, and so ranks
        rows = torch.arange(3) + 3 * number
        batch["question"], batch["is_answer"] = rows % count, (rows < count).long()
        batch["labels"][:, 1] = 5
    objective: Objective = MultipleChoiceAccuracy() if count == 5 else PerTokenLoss()
    wanted = search(model, batches, None, objective)
    given = [batches[:2], batches[2:]] if split == "by the loader" else [batches, batches]
    if split == "by the loader":
        wanted = search(model, batches, None, objective := PerTokenLoss())
    ranks = [forked(sharded_search, rank, 2, model, given[rank], tmp_path, objective) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["kept"] == found[1]["kept"] == {str(depth): list(kept) for depth, kept in wanted.kept.items()}
    assert found[0]["metric"] == found[1]["metric"]
    for depth, value in wanted.metric.items():
        assert found[0]["metric"][str(depth)] == pytest.approx(value, rel=1e-9)
    assert found[0]["measured"] == found[1]["measured"] == wanted.search["measured"]
    assert (found[1]["rows"] < found[0]["rows"]) == (split != "by the loader")  # 3 batches of 5; or 2; or 1 of 1
    assert known(tmp_path) == wanted.search["measured"]
    assert not (tmp_path / "other disk").exists()
