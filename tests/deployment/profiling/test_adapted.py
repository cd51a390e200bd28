"""An elastic model that computes with an adapter is profiled with one like it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AutoTokenizer

from amoeba_plugin.demo.data import MODEL as DEMO_MODEL
from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.asked import flows_of, subject_of
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.search.preflight import profile_for
from amoeba_plugin.elastic.checkpoint import attach_smol, attached_config, load_elastic, save_elastic
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.smol import SmolConfig
from support.elastic_files import write_elastic


@pytest.mark.parametrize("kind", ["none", "smol", "lora"])
def test_the_stand_in_of_a_checkpoint_has_an_adapter_of_the_same_tensors(kind: str, tmp_path: Path):
    live, peft_model = write_elastic(tmp_path), None
    targets = ["q_proj", "down_proj"]
    if kind == "smol":
        peft_model = attach_smol(live, SmolConfig(r=4, num_experts=3, top_k=2, target_modules=targets))
    if kind == "lora":
        peft_model = attach_lora(live, LoraConfig(r=3, target_modules=targets))
    save_elastic(live, peft_model, tmp_path / "adapted", str(tmp_path / "base"))
    subject = subject_of(str(tmp_path / "adapted"), None, [], [])
    stand_in, theirs = load_elastic(subject.save_elastic(tmp_path / "scratch"))
    assert {name: each.shape for name, each in stand_in.model.state_dict().items()} == {
        name: each.shape for name, each in live.model.state_dict().items()
    }
    assert (theirs is None) == (kind == "none")
    assert stand_in.space == live.space
    told = {"smol": "SMOL of rank 4, num_experts 3, combination outputs, on ", "lora": "LORA of rank 3, on "}
    assert attached_config(live) is (None if peft_model is None else peft_model.peft_config["default"])
    assert subject.adapted_by == (told[kind] + "down_proj, q_proj" if kind in told else "")


def test_times_without_the_adapter_are_refused(tmp_path: Path):
    live = write_elastic(tmp_path)
    plain = subject_of(str(tmp_path / "elastic"), None, [], [])
    flows, path, how = flows_of(["torch:elastic"]), tmp_path / "profile.json", Measuring((4,), 2, 1, 1, shapes=2)
    profile_model(plain, flows, path, how, "random", progress=False)
    before = path.read_bytes()
    peft_model = attach_smol(live, SmolConfig(r=4, num_experts=3, target_modules=["q_proj"]))
    save_elastic(live, peft_model, tmp_path / "adapted", str(tmp_path / "base"))
    adapted = subject_of(str(tmp_path / "adapted"), None, [], [])
    told = "was measured with no adapter, and the elastic checkpoint has SMOL of rank 4"
    with pytest.raises(ArtifactError, match=told):
        profile_model(adapted, flows, path, how, "random", progress=False)
    with pytest.raises(ArtifactError, match=told):
        profile_for(Budget.parse("torch:elastic decode<=1000ms"), adapted, path, "random", progress=False)
    assert path.read_bytes() == before
    assert profile_model(plain, flows, path, how, "random", progress=False) == Profile.load(path)
    anew = profile_model(adapted, flows, tmp_path / "another.json", how, "random", progress=False)
    assert anew.flows["torch:elastic"].adapted == adapted.adapted_by


def test_a_damaged_adapter_is_refused(tmp_path: Path):
    write_elastic(tmp_path)
    (tmp_path / "elastic" / "adapter").mkdir()
    (tmp_path / "elastic" / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="adapter is damaged.*copy the checkpoint anew"):
        subject_of(str(tmp_path / "elastic"), None, [], [])


def test_shapes_are_saved_with_the_models_own_tokenizer(tmp_path: Path):
    subject = subject_of(str(DEMO_MODEL), None, ["10"], ["1/2"])
    saved = AutoTokenizer.from_pretrained(subject.save_shape(subject.space.smallest, tmp_path / "own"))
    assert saved.get_vocab() == AutoTokenizer.from_pretrained(DEMO_MODEL).get_vocab()
    write_elastic(tmp_path)  # without a tokenizer
    subject = subject_of(str(tmp_path / "elastic"), None, [], [])
    saved = AutoTokenizer.from_pretrained(subject.save_shape(subject.space.smallest, tmp_path / "none"))
    assert len(saved) == subject.config.vocab_size
