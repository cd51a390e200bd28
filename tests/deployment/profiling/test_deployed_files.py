"""Profiles of files that were deployed: each is run itself, only what is missing, and others' profiles are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.deployed_shapes import DeployedShapes
from amoeba_plugin.deployment.profiling.asked import flows_of, subject_of
from amoeba_plugin.deployment.profiling.deployed_files import profile_files
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.extraction.parity import PARITY_NAME
from amoeba_plugin.serving.feasible import profiled
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import random_model, random_strategy

SHAPES, POINT = ("4x1", "2x1/2"), "torch:fp32"
HOW = Measuring(prompts=(4, 16), decoded=4, rounds=1)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("profiled")
    model = random_model(CONFIG)
    model.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    save_elastic(ElasticModel(model, random_strategy(model)), None, directory / "elastic", str(directory / "base"))
    found = [directory / "whole", directory / "small"]
    for shape, out in zip(SHAPES, found, strict=True):
        deploy_shape(directory / "elastic", shape, POINT, out)
    return found


def test_every_file_is_measured_once_and_another_one_beside_it(deployed: list[Path], tmp_path: Path):
    path = tmp_path / "profile.json"
    first = profile_files(DeployedShapes.of(deployed[:1]), path, HOW, progress=False)
    assert list(first.flows[POINT].shapes) == ["4x1"]
    both = profile_files(DeployedShapes.of(deployed), path, HOW, progress=False)
    assert both == Profile.load(path)
    assert both.flows[POINT].shapes["4x1"] == first.flows[POINT].shapes["4x1"]  # was not visited again
    assert {shape: len(cost.rounds) for shape, cost in both.flows[POINT].shapes.items()} == dict.fromkeys(SHAPES, 1)
    cost = both.flows[POINT].shapes["2x1/2"]
    assert sorted(cost.rounds[0].prefill) == [4, 16]
    assert cost.bytes == sum(each.stat().st_size for each in deployed[1].rglob("*"))
    latency_of = profiled(both, POINT)
    for shape, directory in DeployedShapes.of(deployed).directories.items():
        took = both.flows[POINT].shapes[str(shape)].rounds[0]
        assert latency_of(shape, 16).ttft == took.prefill[16].cpu
        assert latency_of(shape, 16).tpot == took.decode.cpu
        assert latency_of(shape, 8).ttft > 0, directory


def test_it_and_the_profile_of_the_elastic_checkpoint_are_one(deployed: list[Path], tmp_path: Path):
    path, elastic = tmp_path / "profile.json", deployed[0].parent / "elastic"
    subject = subject_of(str(elastic), None, [], [])
    whole = profile_model(subject, flows_of([POINT]), path, Measuring((4, 16), 4, 1, shapes=2), "elastic", False)
    again = profile_files(DeployedShapes.of(deployed[:1]), path, HOW, progress=False)
    assert again == whole  # the largest shape was measured, with the same lengths
    assert set(profile_files(DeployedShapes.of(deployed), path, HOW, progress=False).sizes) == set(whole.sizes)
    with pytest.raises(ArtifactError, match="has torch:fp32 at 1 threads, batches of 1 and 4 decoded tokens"):
        profile_files(DeployedShapes.of(deployed), path, Measuring((4, 8), 8, 1), progress=False)


def rewritten(directory: Path, copy: Path, **served: object) -> Path:
    shutil.copytree(directory, copy)
    record = json.loads((copy / PARITY_NAME).read_bytes())
    record["opening"]["served"] = {**record["opening"]["served"], **served} if served else None
    (copy / PARITY_NAME).write_text(json.dumps(record))
    return copy


def test_files_of_other_models_and_of_versions_before_are_refused(deployed: list[Path], tmp_path: Path):
    path = tmp_path / "profile.json"
    profile_files(DeployedShapes.of(deployed), path, HOW, progress=False)
    other = rewritten(deployed[1], tmp_path / "other", digest="another")
    with pytest.raises(ArtifactError, match="is a profile of another model than"):
        profile_files(DeployedShapes.of([other]), path, HOW, progress=False)
    wider = rewritten(deployed[1], tmp_path / "wider", work=[4, 5, 6])
    with pytest.raises(ArtifactError, match="or of shapes of other sizes; name another file"):
        profile_files(DeployedShapes.of([wider]), path, HOW, progress=False)
    with pytest.raises(ArtifactError, match="a service has one model, and .* are of several"):
        DeployedShapes.of([deployed[0], other]).served()
    with pytest.raises(ArtifactError, match="did not write what a service needs; deploy the shape again"):
        DeployedShapes.of([rewritten(deployed[1], tmp_path / "old")]).served()
