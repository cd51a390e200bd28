"""From a shape of an elastic checkpoint to a directory that an engine runs, alone, and the proof that it does."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from amoeba_plugin.deployment.card import write_deployed_card
from amoeba_plugin.deployment.deployed import KEY, Opening, Served, write_tokenizer
from amoeba_plugin.deployment.engine_parity import CONTEXT, EngineParity, measure_engine
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.flow import DeploymentFlow, Export, Exporter, Point
from amoeba_plugin.deployment.loads import require_loads
from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.deployment.profiling.profile import config_digest
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.rules import engine_rules
from amoeba_plugin.deployment.tokenizers import mended, rendered
from amoeba_plugin.elastic.record import read_record
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import ArtifactError, DeploymentError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.parity import PARITY_NAME
from amoeba_plugin.runtime.files import is_vacant, require_writable, whole_or_nothing, write_atomically
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.runtime.scratch import scratch_directory
from amoeba_plugin.shape import SubnetShape

SMOKE_TOKENS, PLAIN_PROMPT = 16, "The capital of France is"


@dataclass(frozen=True)
class Deployed:
    """What was written.

    Attributes:
        export: Files, bytes and tensor types.
        parity: What its engine makes of it.
        generated: The beginning of an answer, by the engine.
        ways: To run it where it lies: a title, the language, and the text of each.
    """

    export: Export
    parity: EngineParity
    generated: str
    ways: list[tuple[str, str, str]]


def deploy_shape(
    elastic: Path, shape: SubnetShape | str, point: str, output: Path, base: str | None = None
) -> Deployed:
    """Cut a shape out of an elastic checkpoint, export it for an engine, and let the engine prove it.

    Written are the engine's files, what belongs to its tokenizer, ``parity.json`` and a card with the commands that run
    it; all or nothing.

    Args:
        elastic: The elastic checkpoint.
        shape: A shape of its space.
        point: ``flow:scheme``.
        output: New or empty.
        base: Where the base model is now, if it moved.

    Raises:
        ArchitectureError: If the engine's rules say that it cannot hold the shape.
        ArtifactError: If the output is not empty or cannot be written, or the elastic checkpoint is damaged.
        DeploymentError: If the engine is missing, cannot hold the subnet, or computes something else.
        PluginError: If nobody registered the flow.
        ShapeError: If the space does not hold the shape.
    """
    flow, asked = point_named(point)
    if flow.runs_elastic(asked.scheme):
        raise DeploymentError(f"{point} runs the elastic checkpoint as it is: nothing to deploy; {_others(flow)}")
    flow.command()  # refuses where the engine is missing
    space = SubnetStrategy.load(elastic).space
    parsed = space.require(shape)
    require_output(output, elastic)
    _require_held(elastic, parsed, asked, base)
    exact = asked.scheme in flow.exact
    with (
        whole_or_nothing(output) as partial, scratch_directory() as scratch, flow.exporting() as exporter,
        tqdm(total=4, desc="deploy", unit="step", leave=False) as bar,
    ):  # fmt: skip
        checkpoint, told = _extracted(elastic, parsed, base, scratch / "subnet")
        bar.update()
        export = exporter(checkpoint, asked.scheme, partial)
        bar.update()
        parity = measure_engine(flow, asked, export, partial, checkpoint, told)
        if not exact and parsed != space.largest:
            whole = _extracted(elastic, space.largest, base, scratch / "whole")
            parity = parity.beside(_parity_of(*whole, flow, asked, exporter, scratch / "export"))
        parity.require_close(exact)
        bar.update()
        generated, ways = _smoke(flow, asked, export, partial, checkpoint), flow.ways_to_run(export)
        write_tokenizer(checkpoint, partial)
        opening = {KEY: _opening(elastic, parsed, base, checkpoint, export).model_dump()}
        record = {**asdict(parity), **opening, "tensor_types": export.tensor_types, "files": export.files}
        write_atomically(partial / PARITY_NAME, json.dumps(record, indent=1).encode())
        about = {"deployed as": f"`{asked}`, {export.in_words}", "engine": parity.in_words, **_mended_row(told)}
        write_deployed_card(partial, f"{asked} at {parsed}", checkpoint, about, ways)
        bar.update()
    return Deployed(export, parity, generated, ways)


def _opening(elastic: Path, shape: SubnetShape, base: str | None, checkpoint: Path, export: Export) -> Opening:
    subject = subject_of(str(elastic), None, [], [], base)
    served = Served.of(checkpoint, config_digest(subject.config), astuple(Work.of(subject.sizes(shape))))
    return Opening.of(checkpoint, export.entry, str(shape), served)


def _require_held(elastic: Path, shape: SubnetShape, point: Point, base: str | None) -> None:
    """Refuse what an engine cannot hold by its rules, where it has some, before anything is cut."""
    if point.flow in engine_rules():
        where = base or read_record(elastic).base_of(elastic)
        require_loads(str(shape), where, str(point), strategy=elastic)


def _extracted(elastic: Path, shape: SubnetShape, base: str | None, directory: Path) -> tuple[Path, list[str]]:
    """Return a checkpoint of a shape whose tokenizer engines can read, and what was mended of that."""
    extract_checkpoint(elastic, shape, directory, base)
    return mended(directory, directory.with_name(f"{directory.name}-mended"))


def _parity_of(
    checkpoint: Path, told: list[str], flow: DeploymentFlow, point: Point, exporter: Exporter, directory: Path
) -> EngineParity:
    """Return what a scheme does to a checkpoint, of which nothing is kept."""
    directory.mkdir()
    return measure_engine(flow, point, exporter(checkpoint, point.scheme, directory), directory, checkpoint, told)


def _smoke(flow: DeploymentFlow, point: Point, export: Export, directory: Path, checkpoint: Path) -> str:
    """Return the beginning of an answer."""
    if not (checkpoint / "tokenizer.json").is_file():
        return ""
    prompt = rendered(load_tokenizer(str(checkpoint))) or PLAIN_PROMPT
    with EngineProcess(flow.name, flow.command()) as engine:
        path = str(directory / export.entry)
        engine.ask("load", path=path, threads=1, context=CONTEXT, batch=1, **flow.options(point.scheme))
        return str(engine.ask("generate", prompt=prompt, count=SMOKE_TOKENS).value)


def _mended_row(told: list[str]) -> dict[str, str]:
    return {"mended": "; ".join(told)} if told else {}


def _others(flow: DeploymentFlow) -> str:
    return f"take {' or '.join(f'{flow.name}:{each}' for each in flow.schemes if not flow.runs_elastic(each))}"


def require_output(output: Path, elastic: Path) -> None:
    """Refuse a directory that an export cannot be written to.

    Raises:
        ArtifactError: If it is not empty, cannot be written, or is inside the elastic checkpoint.
    """
    if not is_vacant(output):
        what = "is not empty" if output.is_dir() else "is no directory"
        raise ArtifactError(f"{output} exists and {what}; nothing is overwritten: name another directory")
    if elastic.resolve() in output.resolve().parents:
        raise ArtifactError(f"{output} is inside the elastic checkpoint {elastic}; name another directory")
    require_writable(output, whole=True)
