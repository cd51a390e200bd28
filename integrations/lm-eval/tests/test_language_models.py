"""Every way to a subnet gives the likelihoods that plain lm_eval finds: elastic at a shape, extracted, deployed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from amoeba_lm_eval.subjects import Deployed, Elastic, subject_of
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.errors import DataError

SHAPE, LENGTH = "3x1/2", 48
Pairs = list[tuple[str, str]]


def asked(pairs: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(request_type="x", doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)]


TEXTS = [(text,) for text in shipped_texts().passages[:3]]


@pytest.fixture(scope="module")
def witness(files: Any) -> HFLM:
    """Plain lm_eval on the extracted checkpoint, as its own command loads it."""
    return HFLM(pretrained=str(files.subnet), device="cpu", dtype="float32", max_length=LENGTH, batch_size=1)


@pytest.fixture(scope="module")
def deployed(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployed") / "out"
    deploy_shape(files.elastic, SHAPE, "torch:fp32", out)
    return out


def require_same(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]], tolerance: float = 1e-4) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=tolerance)


def test_an_elastic_model_at_a_shape_scores_as_the_checkpoint_that_is_cut_out(files: Any, witness: HFLM, pairs: Pairs):
    subject = subject_of(str(files.elastic))
    assert isinstance(subject, Elastic)
    with subject.opened(LENGTH, 4, 1) as (lm, at):
        whole = lm.loglikelihood(asked(pairs))
        with at(SHAPE):
            found, rolling = lm.loglikelihood(asked(pairs)), lm.loglikelihood_rolling(asked(TEXTS))
        again = lm.loglikelihood(asked(pairs))
    require_same(found, witness.loglikelihood(asked(pairs)))
    assert rolling == pytest.approx(witness.loglikelihood_rolling(asked(TEXTS)), abs=1e-3)  # sums over 100 tokens
    assert whole == again
    assert max(abs(one - other) for (one, _), (other, _) in zip(whole, found, strict=True)) > 0.1  # shapes do differ


def test_a_deployed_subnet_scores_in_its_engine_as_the_checkpoint_does(deployed: Path, witness: HFLM, pairs: Pairs):
    subject = subject_of(str(deployed))
    assert isinstance(subject, Deployed)
    assert subject.shapes == ("3x1/2 in torch:fp32",)
    with subject.opened(LENGTH, 4, 1) as (lm, at), at(SHAPE):
        found, rolling = lm.loglikelihood(asked(pairs)), lm.loglikelihood_rolling(asked(TEXTS))
    require_same(found, witness.loglikelihood(asked(pairs)))
    assert rolling == pytest.approx(witness.loglikelihood_rolling(asked(TEXTS)), abs=1e-3)


def test_the_likeliest_continuation_is_told_to_be_it_where_that_counts(
    deployed: Path, files: Any, monkeypatch: pytest.MonkeyPatch
):
    model, words = AutoModelForCausalLM.from_pretrained(files.subnet), AutoTokenizer.from_pretrained(files.subnet)
    best, second = [], []
    for length in range(10, 60):
        context = TEXTS[0][0][:length].rstrip()
        ids = words(context)["input_ids"]
        with torch.no_grad():
            ranked = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
        for place, found in ((0, best), (1, second)):
            text = words.decode([ranked[place]])
            if words(context + text)["input_ids"] == [*ids, ranked[place]]:
                found.append((context, text))
    assert best
    assert second
    with subject_of(str(deployed)).opened(LENGTH, 4, 1) as (lm, _):
        assert {likeliest for _, likeliest in lm.loglikelihood(asked(best))} == {True}
        told = lm.loglikelihood(asked(second))
        assert {likeliest for _, likeliest in told} == {False}
        lm.needs_likeliest = False
        monkeypatch.setattr(lm, "_are_likeliest", pytest.fail)  # takes an engine long
        assert lm.loglikelihood(asked(second)) == told
        lm.needs_likeliest = True
        assert lm.loglikelihood_rolling(asked(TEXTS[:1]))


def test_the_likelihood_of_a_text_is_what_a_loop_of_five_lines_finds(files: Any, deployed: Path):
    model, words = AutoModelForCausalLM.from_pretrained(files.subnet), AutoTokenizer.from_pretrained(files.subnet)
    wanted, ids = 0.0, words(TEXTS[0][0])["input_ids"]
    assert len(ids) > LENGTH  # more windows than one
    for start in range(0, len(ids), LENGTH):
        window = ids[start : start + LENGTH]
        before = [0] if start == 0 else [ids[start - 1]]
        # the last window is filled up with context in front, as the harness does it
        extra = ids[max(start - 1 - (LENGTH - len(window)), 0) : start - 1] if start else []
        with torch.no_grad():
            logits = model(torch.tensor([[*extra, *before, *window][:-1]])).logits[0].log_softmax(-1)
        wanted += logits[len(extra) :].gather(1, torch.tensor(window)[:, None]).sum().item()
    for path in (files.subnet, deployed):
        with subject_of(str(path)).opened(LENGTH, 2, 1) as (lm, _):
            assert lm.loglikelihood_rolling(asked(TEXTS[:1])) == pytest.approx([wanted], abs=1e-3)


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("amoeba_llama_cpp") is None,
    reason="needs the integration llama-cpp: pip install ./integrations/llama-cpp",
)
def test_a_gguf_is_scored_by_llama_cpp_as_torch_scores_the_subnet(files: Any, tmp_path: Path, pairs: Pairs):
    deploy_shape(files.plain, SHAPE, "llama-cpp:F32", tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()  # nothing that transformers could load
    with subject_of(str(tmp_path / "out")).opened(LENGTH, 1, 1) as (lm, _):
        found, rolling = lm.loglikelihood(asked(pairs)), lm.loglikelihood_rolling(asked(TEXTS))
    with subject_of(str(files.plain)).opened(LENGTH, 1, 1) as (lm, at), at(SHAPE):
        wanted, whole = lm.loglikelihood(asked(pairs)), lm.loglikelihood_rolling(asked(TEXTS))
    assert sum(one[1] == other[1] for one, other in zip(found, wanted, strict=True)) >= len(wanted) - 1
    worst = max(abs(one - other) for (one, _), (other, _) in zip(found, wanted, strict=True))
    assert 0 < worst < 0.05  # it is another program: keys and values in half precision, as it runs
    assert rolling == pytest.approx(whole, rel=2e-3)


def test_requests_longer_than_the_model_sees_are_counted_or_refused(files: Any, deployed: Path, witness: HFLM):
    (text,) = TEXTS[0]
    long = [(text, " red"), ("Rain is", " red")]
    for path in (files.subnet, deployed):
        with subject_of(str(path)).opened(LENGTH, 2, 1) as (lm, _):
            require_same(lm.loglikelihood(asked(long)), witness.loglikelihood(asked(long)))
            assert lm.cut == 1
            with pytest.raises(DataError, match=f"the model sees {LENGTH}.*raise --max-length"):
                lm.loglikelihood(asked([("Rain is", text)]))


def test_shapes_are_in_the_order_of_their_space_and_only_an_elastic_checkpoint_has_several(files: Any):
    assert subject_of(str(files.elastic), "3x1/2,4").shapes == ("4x1", "3x1/2")
    assert len(subject_of(str(files.elastic)).shapes) == 9
