"""A selection that is stopped behind any of its steps, and started again, ends with the bits of one that was not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from llmcompressor.core import active_session
from transformers import PreTrainedModel

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.modifiers.selection import selection_for
from amoeba_plugin.modifiers.session_training import begin_session
from amoeba_plugin.selection import kept_steps
from amoeba_plugin.selection.depth.lockstep import Lockstep
from support.batches import make_random_batches
from support.models import make_tiny_model
from support.recipes import GIVEN_DEPTHS, TRAIN_FIELDS, recipe

pytestmark = pytest.mark.usefixtures("fresh_session")
DEPTHS = {"min_depth": 2, "kept_layers": GIVEN_DEPTHS}
WIDTHS = {"widths": ["1", "3/4", "1/2"]}
STEPS = ["ranking", "folds_3", "folds_2", "width_3-4", "width_1-2"]
Found = tuple[dict[str, Any], bytes]
NARROW = range(
    4 + 1, 3 * 4 + 1
)  # layers that a width runs: each narrow, and before that a part of it or both as they are


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were run so far, one after the other."""
    seen: list[int] = []
    run_layer = Lockstep.run_layer

    def counted(self: Lockstep, layer: int, *args: Any) -> None:
        seen.append(layer)
        run_layer(self, layer, *args)

    monkeypatch.setattr(Lockstep, "run_layer", counted)
    return seen


def selected(
    kept: Path | None, width: dict[str, Any] = WIDTHS, depth: dict[str, Any] = DEPTHS, data: int = 1,
    model: PreTrainedModel | None = None,
) -> Found:  # fmt: skip
    """Select with a fresh model; return the strategy as it is written, and the fields that the selection filled in."""
    resume = {} if kept is None else {"resume_dir": str(kept)}
    model = model or make_tiny_model("llama")
    with TemporaryDirectory() as directory:
        text = recipe(
            {"DepthShrinkingModifier": depth}, {"WidthShrinkingModifier": {**width, **resume}},
            {"OneForAllDistillationModifier": TRAIN_FIELDS | {"elastic_dir": f"{directory}/elastic"}},
        )  # fmt: skip
        begin_session(text, model, make_random_batches(2, rows=4, seed=data), train_data=[])
        selection_for(active_session().state).require_elastic(model).strategy.save(Path(directory))
        document = json.loads((Path(directory) / "strategy.json").read_bytes())
        tensors = (Path(directory) / "strategy.safetensors").read_bytes()
    del document["provenance"]["seconds"]
    document["fields"] = active_session().lifecycle.recipe.modifiers[1].model_dump(exclude={"resume_dir"})  # filled in
    return document, tensors


class StoppedError(Exception):
    pass


def stopping(patch: pytest.MonkeyPatch, after: int, seen: Callable[[Path], object] = lambda path: None) -> None:
    """Stop behind so many files of steps, of which each has two."""
    write, written = kept_steps.write_atomically, []

    def stopped(path: Path, data: bytes) -> None:
        write(path, data)
        seen(path)
        written.append(path)
        if len(written) == after:
            raise StoppedError

    patch.setattr(kept_steps, "write_atomically", stopped)


@pytest.mark.parametrize(
    "width",
    [
        WIDTHS,
        WIDTHS | {"importance": "flap", "anchor_layers": 1},
        {"totals": ["3/4", "1/2"], "round_to": {"mlp": 8}},
        WIDTHS | {"bias_compensation": True, "allocation": "global"},
    ],
    ids=["measured", "anchors", "totals", "biases"],
)
def test_a_selection_goes_on_behind_the_last_step_that_was_done(
    tmp_path: Path, layers: list[int], width: dict[str, Any]
) -> None:
    wanted = selected(None, width)
    counts, names = [0], []
    layers.clear()
    with pytest.MonkeyPatch.context() as patched:

        def note(path: Path) -> None:
            if path.suffix == ".json":
                counts.append(len(layers))
                names.append(path.stem)

        stopping(patched, 0, note)
        assert selected(tmp_path / "steps", width) == wanted
    anchors = wanted[0]["fields"]["anchor_layers"]
    assert len(anchors) == 1 if "anchor_layers" in width else anchors == 0
    total = len(layers)
    assert names[:3] == STEPS[:3]
    if width is WIDTHS:
        assert names == STEPS
    for before, after, name in zip(counts, counts[1:], names, strict=False):
        assert after - before in NARROW or not name.startswith("width")
    for files in (2, 3, 4, 6, 8, 9) if width is WIDTHS else (3, 2 * len(names) - 1):
        steps = tmp_path / f"steps{files}"
        with pytest.MonkeyPatch.context() as patched:
            stopping(patched, files)
            with pytest.raises(StoppedError):
                selected(steps, width)
        layers.clear()
        assert selected(steps, width) == wanted
        assert len(layers) == total - counts[files // 2]
        assert {each.name for each in steps.iterdir()} == {f"{a}.{b}" for a in names for b in ("json", "safetensors")}


@pytest.fixture(scope="module")
def whole() -> Found:
    return selected(None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The steps of a selection that is done."""
    steps = tmp_path_factory.mktemp("done") / "steps"
    selected(steps)
    return steps


@pytest.fixture
def steps(done: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(done, tmp_path / "steps"))


def contents(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in directory.iterdir()}


def test_of_a_selection_that_is_done_nothing_runs(whole: Found, steps: Path, layers: list[int]) -> None:
    before = contents(steps)
    assert selected(steps) == whole
    assert layers == []
    assert contents(steps) == before


def test_without_a_directory_nothing_is_written(whole: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kept_steps, "write_atomically", None)
    assert selected(None) == whole
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "file", "message"),
    [
        ({"data": 2}, "ranking", "data is [0-9a-f]{64}, there it is [0-9a-f]{64}"),
        ({"width": WIDTHS | {"importance": "wanda"}}, "ranking", "importance is wanda, there it is obs"),
        ({"width": WIDTHS | {"round_to": 16}}, "ranking", "round_to is 16, there it is 1"),
        (
            {"width": WIDTHS | {"repair": "none"}},
            "ranking",
            "importance is flap, there it is obs; repair is none, there it is least_squares",
        ),
        ({"width": WIDTHS | {"allocation": "uniform"}}, "ranking", "allocation is uniform, there it is measured"),
        ({"width": {"widths": ["1", "1/2"]}}, "ranking", r'widths is \["1", "1/2"\], there it is'),
        ({"width": WIDTHS | {"totals": ["1/2"]}}, "ranking", "totals is .*; depth is .*, there it is none"),
        (
            {"depth": DEPTHS | {"kept_layers": GIVEN_DEPTHS | {"3": [0, 1, 3]}}},
            "folds_3",
            "depth is [0-9a-f]{64}, there it is [0-9a-f]{64}",
        ),
        ({"depth": DEPTHS | {"repair": "none"}}, "width_3-4", "depth_repair is False, there it is True"),
    ],
)
def test_steps_of_another_selection_are_refused_and_stay(
    steps: Path, other: dict[str, Any], file: str, message: str
) -> None:
    before = contents(steps)
    told = rf"{file}\.json is of another selection: {message}.*Resume with the same model"
    with pytest.raises(ArtifactError, match=told):
        selected(steps, **other)
    assert contents(steps) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make_tiny_model("llama", seed=1), "model is [0-9a-f]{64}, there it is [0-9a-f]{64}"),
        (lambda: make_tiny_model("llama").bfloat16(), "dtype is torch.bfloat16, there it is torch.float32"),
    ],
)
def test_steps_of_another_model_are_refused(steps: Path, model: Callable[[], PreTrainedModel], message: str) -> None:
    with pytest.raises(ArtifactError, match=rf"ranking\.json is of another selection: {message}"):
        selected(steps, model=model())


@pytest.mark.parametrize("name", ["ranking", "folds_2", "width_1-2"])
@pytest.mark.parametrize("what", ["cut json", "cut tensors", "flipped", "no tensors", "units", "foreign", "version"])
def test_a_damaged_step_is_refused_in_words_and_made_again_where_it_is_deleted(
    whole: Found, steps: Path, name: str, what: str
) -> None:
    told, tensors = steps / f"{name}.json", steps / f"{name}.safetensors"
    changes = {"units": {"values": {"units": {}}}, "foreign": {"format": "other"}, "version": {"version": 2}}
    if what.startswith("cut"):
        cut = told if what == "cut json" else tensors
        cut.write_bytes(cut.read_bytes()[:-9])
    elif what == "flipped":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif what == "no tensors":
        tensors.unlink()
    else:
        told.write_text(json.dumps(json.loads(told.read_bytes()) | changes[what]))
    with pytest.raises(ArtifactError, match=rf"{name}\.json is damaged, or no step of a selection .*; delete it, or"):
        selected(steps)
    told.unlink()
    assert selected(steps) == whole
