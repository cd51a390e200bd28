"""An elastic model that computes with an adapter is profiled with one like it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
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


def test_a_damaged_adapter_is_refused(tmp_path: Path):
    write_elastic(tmp_path)
    (tmp_path / "elastic" / "adapter").mkdir()
    (tmp_path / "elastic" / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="adapter is damaged.*copy the checkpoint anew"):
        subject_of(str(tmp_path / "elastic"), None, [], [])
