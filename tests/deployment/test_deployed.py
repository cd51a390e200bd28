"""A deployed directory opens again, in its own engine, and says how text becomes tokens there."""

from __future__ import annotations

import base64
import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM

from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.deployed import is_deployed, read_opening, running
from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.deployment.profiling.profile import config_digest
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import random_model, random_strategy


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deployed")
    model = random_model(CONFIG)
    model.save_pretrained(directory / "base")
    words = tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 0), ("<end>", 1)]
    )
    words.save_pretrained(directory / "base")
    save_elastic(ElasticModel(model, random_strategy(model)), None, directory / "elastic", str(directory / "base"))
    deploy_shape(directory / "elastic", "3x1/2", "torch:fp32", directory / "out")
    return directory / "out"


def test_it_says_what_its_engine_loads_and_how_texts_begin(deployed: Path):
    point, opening = read_opening(deployed)
    assert point == "torch:fp32"
    assert opening.served is not None
    told = {"entry": ".", "shape": "3x1/2", "room": 512, "first": 0, "added": (0,)}
    assert opening.model_dump(exclude={"served"}) == told
    subject = subject_of(str(deployed.parent / "elastic"), None, [], [])
    assert opening.served.model_dump() == {
        "vocabulary": 512, "ends": (1,), "digest": config_digest(subject.config),
        "work": astuple(Work.of(subject.sizes(SubnetShape.parse("3x1/2")))),
    }  # fmt: skip
    assert is_deployed(deployed)


def test_its_engine_computes_what_the_files_hold(deployed: Path):
    tokens = [5, 6, 7, 8]
    with running(deployed, context=16) as engine:
        answer = engine.ask("log_probabilities", tokens=tokens, behind=[4]).value
    found = torch.tensor(np.frombuffer(base64.b64decode(answer[0]), "<f4").copy())
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(deployed)(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_what_is_none_or_does_not_say_how_is_refused(deployed: Path, tmp_path: Path):
    assert not is_deployed(tmp_path)
    with pytest.raises(ArtifactError, match="is nothing that `amoeba deploy` wrote"):
        read_opening(tmp_path)
    (tmp_path / "parity.json").write_text("{")
    assert not is_deployed(tmp_path)
    record = json.loads((deployed / "parity.json").read_bytes())
    (tmp_path / "parity.json").write_text(json.dumps({**record, "opening": {**record["opening"], "entry": "model"}}))
    with pytest.raises(ArtifactError, match="lacks model, which torch:fp32 runs"), running(tmp_path, 16):
        pass
    del record["opening"]
    (tmp_path / "parity.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="of an older version, or damaged; deploy the shape again"):
        read_opening(tmp_path)
