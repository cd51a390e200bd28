"""Batches drawn once, statistics exact for any cut into batches, data sets read from wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.errors import DataError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection import activation_stats
from amoeba_plugin.selection.activation_stats import ActivationStats, collect_statistics
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]
FAMILY = ["llama", "mistral", "qwen2", "qwen3"]


# --- materialise


def test_batches_are_drawn_once_and_completed() -> None:
    drawn = []

    def loader() -> Any:
        for number in range(2):
            drawn.append(number)
            yield {
                "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
                "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
                "text": ["five", "eight"],
            }

    batches = materialise(loader())
    assert drawn == [0, 1]
    assert [list(batch) for batch in batches] == [["input_ids", "attention_mask", "labels"]] * 2
    assert batches[0]["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]


def test_given_labels_and_numeric_columns_stay_and_lists_become_tensors() -> None:
    (batch,) = materialise(
        [{"input_ids": [[5, 6]], "labels": [[-100, 6]], "question": [3], "is_answer": [True]}], "cpu"
    )
    assert batch["labels"].tolist() == [[-100, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1]]
    assert (batch["question"].tolist(), batch["is_answer"].tolist()) == ([3], [True])


def test_after_left_padding_nothing_is_predicted_from_a_padded_position() -> None:
    mask = torch.tensor([[0, 0, 1, 1]])
    (batch,) = materialise([{"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": mask}])
    assert batch["labels"].tolist() == [[-100, -100, -100, 6]]


def test_the_loader_s_own_tensors_are_not_changed() -> None:
    given = {"input_ids": torch.tensor([[5, 6]])}
    batch = materialise([given])[0]
    assert list(given) == ["input_ids"]
    assert batch["labels"].data_ptr() != given["input_ids"].data_ptr()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "there is no calibration data: .* pass dataset="),
        ([], "the calibration data is empty; pass a data set with rows"),
        ([{"text": ["a"]}], "calibration batch 0 has no input_ids, only text; tokenise"),
        ([{}], "calibration batch 0 has no input_ids, only nothing"),
        ([{"input_ids": torch.tensor([5, 6])}], r"have shape \(2,\); \(batch, positions\) is wanted"),
        (
            [{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5]])}],
            r"batch 0 has input_ids \(1, 2\) and labels \(1, 1\)",
        ),
        (
            [{"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1, 1]])}],
            r"batch 0 has input_ids \(1, 2\) and attention_mask \(1, 3\)",
        ),
        ([{"input_ids": torch.tensor([[5], [6]])}] * 3, r"nothing to predict in 3 batches, .* has 1 token\(s\)"),
        ([{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, -100]])}], "too short: nothing to predict"),
    ],
)
def test_missing_and_short_data_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        materialise(loader)


# --- statistics


def looped(values: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    """Return mean, variance and second moment of each channel; the definition, in Python's floats."""
    means, variances, moments = [], [], []
    for channel in zip(*values, strict=True):
        mean = sum(channel) / len(channel)
        means.append(mean)
        variances.append(sum((x - mean) ** 2 for x in channel) / len(channel))
        moments.append(sum(x**2 for x in channel) / len(channel))
    return means, variances, moments


@given(st.integers(1, 40), st.data(), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_merging_any_cut_gives_the_single_pass(tokens: int, data: st.DataObject, offset: float, spread: float) -> None:
    inputs = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(tokens)) * spread + offset
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=6)))
    bounds = [0, *cuts, tokens]
    merged = ActivationStats.empty(3)
    for start, stop in pairwise(bounds):  # empty parts too
        merged = merged.merge(ActivationStats.of(inputs[start:stop]))
    mean, variance, moment = (torch.tensor(each, dtype=torch.float64) for each in looped(inputs.double().tolist()))
    assert merged.tokens == tokens
    scale = float(inputs.abs().max()) ** 2
    torch.testing.assert_close(merged.mean, mean, rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(merged.variance, variance, rtol=1e-7, atol=1e-12 * scale)
    torch.testing.assert_close(merged.second_moment, moment, rtol=1e-9, atol=1e-12 * scale)


def test_no_tokens_have_no_spread() -> None:
    nothing = ActivationStats.empty(2).merge(ActivationStats.empty(2))
    assert (nothing.tokens, nothing.variance.tolist()) == (0, [0.0, 0.0])


def test_many_tokens_are_taken_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 100
    whole = ActivationStats.of(inputs)
    monkeypatch.setattr(activation_stats, "VALUES_AT_ONCE", 30)  # 7 tokens
    parts = ActivationStats.of(inputs)
    assert parts.tokens == whole.tokens == 50
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.variance, whole.variance, rtol=1e-9, atol=0)


@pytest.mark.parametrize("model_type", FAMILY)
def test_statistics_are_those_of_every_real_token_run_alone(
    tiny_model: TinyModel, random_batches: RandomBatches, model_type: str
) -> None:
    model = tiny_model(model_type)
    batches = random_batches(2, 3, 10, lengths=(10, 4, 7))
    inputs: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for name, linear in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            linear.register_forward_hook(
                lambda module, args, output, key=f"{index}.{name}": inputs.setdefault(key, []).append(args[0][0])
            )
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(ids[None, : int(mask.sum())], use_cache=False)  # unpadded, one row at a time
    wanted = {key: torch.cat(parts).double() for key, parts in inputs.items()}
    found = collect_statistics(tiny_model(model_type), architecture_for(model_type), batches, progress=False)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key].tokens == len(values) == 42
        torch.testing.assert_close(found[key].mean, values.mean(dim=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[key].variance, values.var(dim=0, correction=0), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found[key].second_moment, values.square().mean(dim=0), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_statistics_do_not_depend_on_the_batch_size(
    tiny_model: TinyModel, random_batches: RandomBatches, rows: int
) -> None:
    model, adapter = tiny_model("llama"), architecture_for("llama")
    (whole,) = random_batches(1, 6, 10, lengths=(10, 3, 10, 8, 1, 5))
    parts = [{name: value[start : start + rows] for name, value in whole.items()} for start in range(0, 6, rows)]
    wanted = collect_statistics(model, adapter, [whole], progress=False)
    for key, stats in collect_statistics(model, adapter, parts, progress=False).items():
        torch.testing.assert_close(stats.variance, wanted[key].variance, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(stats.mean, wanted[key].mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_layer_and_batch_and_leave_no_hook(
    tiny_model: TinyModel, random_batches: RandomBatches, value: float
) -> None:
    model, batches = tiny_model("llama").train(), random_batches(3)
    batches[1]["input_ids"][0, 0] = 2
    batches[0]["input_ids"].clamp_(min=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = value
    with pytest.raises(DataError, match=r"activations of 0\.attention are NaN or infinite on calibration batch 1"):
        collect_statistics(model, architecture_for("llama"), batches, progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_statistics_need_tokens(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    for batches in ([], random_batches(1, lengths=(0, 0))):
        with pytest.raises(DataError, match="no token to collect statistics from"):
            collect_statistics(tiny_model("llama"), architecture_for("llama"), batches)


# --- data sets


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word w0..w199; BOS 1, EOS 2."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number + 3 for number in range(200)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TEXTS = [" ".join(f"w{10 * row + word}" for word in range(10)) for row in range(20)]
# the whole text as tokens, each row followed by EOS
STREAM = [token for row in range(20) for token in (*range(10 * row + 3, 10 * row + 13), 2)]
OPTIONS = {"split": "train", "num_samples": 5, "max_seq_length": 8, "batch_size": 2, "seed": 0}


def write(path: Path, kind: str) -> str:
    if kind == "txt":
        path.with_suffix(".txt").write_text("\n".join(TEXTS))
    elif kind == "jsonl":
        path.with_suffix(".jsonl").write_text(
            "\n".join(json.dumps({"id": str(i), "text": t}) for i, t in enumerate(TEXTS))
        )
    elif kind == "json":
        path.with_suffix(".json").write_text(json.dumps([{"content": text, "id": i} for i, text in enumerate(TEXTS)]))
    elif kind == "csv":
        Dataset.from_dict({"content": TEXTS}).to_csv(str(path.with_suffix(".csv")), index=False)
    elif kind == "parquet":
        Dataset.from_dict({"content": TEXTS}).to_parquet(str(path.with_suffix(".parquet")))
    elif kind == "directory":
        Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))
        return str(path)
    elif kind == "splits":
        DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(path))
        return str(path)
    return str(path.with_suffix(f".{kind}"))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "directory", "splits"])
def test_text_from_anywhere_becomes_blocks(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    batches = load_batches(write(tmp_path / "data", kind), tokenizer, **OPTIONS)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    stream = [token for token in STREAM if token != 2 or kind != "txt"] + [2]  # a .txt file is one document
    doubled = stream + stream
    for row in rows:
        assert row[0] == 1
        start = doubled.index(row[1]) if row[1] != 2 else doubled.index(row[2]) - 1
        assert doubled[start : start + 7] == row[1:] or doubled[start + len(stream) :][:7] == row[1:]
    assert len({tuple(row) for row in rows}) == 5
    for batch in batches:
        assert batch["labels"][:, 0].eq(-100).all()
        assert batch["labels"][:, 1:].equal(batch["input_ids"][:, 1:])
        assert batch["attention_mask"].eq(1).all()


def test_the_same_seed_draws_the_same_blocks(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data", "jsonl")
    first, again = (load_batches(path, tokenizer, **OPTIONS)[0]["input_ids"] for _ in range(2))
    assert first.equal(again)
    assert not first.equal(load_batches(path, tokenizer, **(OPTIONS | {"seed": 1}))[0]["input_ids"])


def test_tokenised_rows_are_used_as_they_are_and_padded(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": [-100] * (n - 1) + [2 + n]} for n in (4, 6, 12)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    (batch,) = load_batches(str(tmp_path / "data"), tokenizer, **(OPTIONS | {"batch_size": 3, "num_samples": 3}))
    assert sorted(batch["attention_mask"].sum(dim=1).tolist()) == [4, 6, 8]  # 12 are cut at max_seq_length
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert ids.tolist() == [*range(3, 3 + length)] + [0] * (8 - length)
        assert labels[: length - 1].eq(-100).all()
        assert labels[length:].eq(-100).all()


def test_questions_are_drawn_whole(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {
            "input_ids": [1, 5 + question, 9 + row],
            "labels": [-100, -100, 9 + row],
            "question": question,
            "is_answer": int(row == 1),
        }
        for question in range(6)
        for row in range(4)
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    batches = load_batches(str(tmp_path / "data"), tokenizer, **(OPTIONS | {"num_samples": 10, "batch_size": 3}))
    MultipleChoiceAccuracy().check(batches)
    assert sum(len(batch["question"]) for batch in batches) == 8


def test_fewer_samples_than_asked_for_are_told(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches = load_batches(write(tmp_path / "data", "directory"), tokenizer, **(OPTIONS | {"num_samples": 99}))
    assert sum(len(batch["input_ids"]) for batch in batches) == 220 // 7
    assert "gives 31 samples where 99 were asked for" in caplog.text


def dataset_of(tmp_path: Path, columns: dict[str, Any]) -> str:
    Dataset.from_dict(columns).save_to_disk(str(tmp_path / "data"))
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": []}, {}, "cannot be read: it is empty"),
        (
            {"text": ["w1 w2"]},
            {},
            "too short: 3 tokens, and one sample takes 7; give more text, or a max_seq_length .--max-seq-length. of 3",
        ),
        ({"text": [None, ""]}, {}, "has no text in column text"),
        ({"a": ["w1"], "b": ["w2"]}, {}, "no column text, nor a single column of strings; its columns are a, b"),
        ({"n": [1]}, {}, "its columns are n: name the one"),
        ({"a": ["w1"], "b": ["w2"]}, {"text_column": "c"}, "no column 'c' of strings; its columns are a, b"),
        ({"text": TEXTS}, {"num_samples": 0}, "0 samples of 8 tokens in batches of 2 are impossible"),
        ({"text": TEXTS}, {"max_seq_length": 1}, "5 samples of 1 tokens in batches of 2 are impossible"),
        ({"input_ids": [[5], [6]]}, {}, r"too short: nothing to predict in 1 batches"),
    ],
)
def test_unusable_data_sets_are_refused(
    tmp_path: Path, tokenizer: Any, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_batches(dataset_of(tmp_path, columns), tokenizer, **(OPTIONS | options))


def test_the_named_column_is_read(tmp_path: Path, tokenizer: Any) -> None:
    path = dataset_of(tmp_path, {"text": ["w0"] * 20, "other": TEXTS})
    batches = load_batches(path, tokenizer, **OPTIONS, text_column="other")
    assert any(int(token) > 3 for token in batches[0]["input_ids"].flatten())


def test_data_that_cannot_be_read_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "data.docx").write_text("w1")
    with pytest.raises(DataError, match=r"has none of the endings \.json, \.jsonl, \.txt, \.csv, \.parquet"):
        load_batches(str(tmp_path / "data.docx"), tokenizer, **OPTIONS)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.csv").write_text("text\n")
    for name in ("empty.jsonl", "empty.csv"):
        with pytest.raises(DataError, match="cannot be read: it is empty"):
            load_batches(str(tmp_path / name), tokenizer, **OPTIONS)
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(DataError, match="broken.jsonl, split train, cannot be read: JSON parse error"):
        load_batches(str(tmp_path / "broken.jsonl"), tokenizer, **OPTIONS)
    with pytest.raises(DataError, match="nowhere, split train, cannot be read: it is no path here"):
        load_batches(str(tmp_path / "nowhere"), tokenizer, **OPTIONS)
    with pytest.raises(DataError, match=f"nowhere.jsonl: no such file in {tmp_path}"):
        load_batches(str(tmp_path / "nowhere.jsonl"), tokenizer, **OPTIONS)
    path = write(tmp_path / "splits", "splits")
    with pytest.raises(DataError, match="has no split 'test'; it has train"):
        load_batches(path, tokenizer, **(OPTIONS | {"split": "test"}))


def test_sequences_of_one_token_are_told(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    with caplog.at_level("WARNING"):
        materialise([{"input_ids": torch.tensor([[5, 6, 7], [5, 0, 0], [0, 0, 0]]), "attention_mask": mask}])
    assert "2 of 3 calibration sequences have one token or none" in caplog.text
    caplog.clear()
    materialise([{"input_ids": torch.tensor([[5, 6]])}])
    assert not caplog.text
