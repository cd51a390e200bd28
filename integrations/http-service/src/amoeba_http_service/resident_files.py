"""Deployed files made ready: the profile of their engine, measured first where there is none, processes, a worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from amoeba_http_service.resident import ROUNDS, How, Resident, decider_of
from amoeba_http_service.settings import Limits
from amoeba_plugin.deployment.deployed_shapes import DeployedShapes
from amoeba_plugin.deployment.profiling.deployed_files import known_of, profile_files
from amoeba_plugin.deployment.profiling.measure import Measuring
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.errors import ArtifactError, DataError, ServiceError
from amoeba_plugin.runtime.messages import say
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.serving.feasible import profiled
from amoeba_plugin.serving.files import FilesBackend, ResidentShapes, require_followed
from amoeba_plugin.serving.service import ElasticService

CONTEXT = 2048  # tokens, at most, where none are named: every engine keeps room for them
LONGEST, LEAST = 256, 8  # tokens of prompts that are measured


@contextmanager
def files_resident(directories: Sequence[Path], how: How, limits: Limits) -> Iterator[Resident]:
    """Start the engine of each file, and a worker, for a block of code.

    Args:
        directories: That ``amoeba deploy`` wrote for one engine, each of another shape of one model.
        how: Profile, decider, threads, context.
        limits: Of which the requests that wait count.

    Raises:
        ArtifactError: If they do not go together, lack a tokenizer, or the profile is of another model or machine.
        DeploymentError: If the engine is missing or fails.
        ServiceError: If it is asked for what files cannot do.
        ShapeError: If the decider's shape is none of theirs.
    """
    _require_possible(how)
    files = DeployedShapes.of(directories)
    served, context = files.served(), _context(files, how.context)
    largest = served[max(served)]
    try:
        tokenizer = load_tokenizer(str(files.directories[max(served)]))
    except DataError as error:
        raise ArtifactError(f"{error}, or deploy the shape again") from error
    decider = decider_of(how, ResidentShapes.of(served))
    require_followed(files.point)
    profile = profile_of_files(files, how, context)
    threads, latency_of = profile.flows[files.point].threads, profiled(profile, files.point)
    with FilesBackend(directories, largest.vocabulary, context, threads) as backend:
        service = ElasticService(backend, latency_of, decider, most_waiting=limits.waiting)
        try:
            yield Resident(files.point, service, backend, tokenizer, latency_of, frozenset(largest.ends))
        finally:
            service.close(finish=False)


def profile_of_files(files: DeployedShapes, how: How, context: int, progress: bool = True) -> Profile:
    """Return a profile that knows what every file takes in its engine; what is missing is measured.

    Args:
        files: Of one engine.
        how: File and threads.
        context: Tokens of the longest prompt that is measured, with what follows it.
        progress: Show a progress bar.

    Raises:
        ArtifactError: If the file is of another model or machine, or was measured with other threads.
        DeploymentError: If the engine is missing or fails.
    """
    known = known_of(files, how.profile)
    flow = None if known is None else known.flows.get(files.point)
    if flow is not None and how.threads not in (None, flow.threads):
        raise ArtifactError(
            f"{how.profile} was measured with {flow.threads} threads, and --threads asks for {how.threads}; name "
            "another file by --profile, or leave --threads out"
        )
    if known is not None and flow is not None and flow.shapes and set(map(str, files.directories)) <= set(known.sizes):
        return known
    say(f"measuring what the files take on this machine, once; it will be in {how.profile}")
    plan = Measuring() if flow is None else Measuring(decoded=flow.decoded)
    longest = min(LONGEST, context - plan.decoded - 1)
    lengths = tuple(sorted({max(longest // share, LEAST) for share in (8, 2, 1)}))
    threads = flow.threads if flow is not None else how.threads or 1
    return profile_files(files, how.profile, Measuring(lengths, plan.decoded, ROUNDS, threads), progress)


def _require_possible(how: How) -> None:
    if how.decisions is not None or how.decider == "dual_head":
        raise ServiceError(
            "a compact model belongs to an elastic checkpoint, and deployed files are none; serve that, or leave out "
            "--decisions and dual_head"
        )
    if how.drafts:
        raise ServiceError(
            "small shapes draft for larger ones where they share weights, and deployed files do not; serve the elastic "
            "checkpoint, or leave out --drafts"
        )
    if how.base is not None:
        raise ServiceError("--base is of an elastic checkpoint; deployed files need no base model: leave it out")


def _context(files: DeployedShapes, asked: int | None) -> int:
    """Return how many tokens a prompt and its answer may have together.

    Raises:
        ServiceError: If the model has fewer positions.
    """
    if asked is None:
        return min(files.room or CONTEXT, CONTEXT)
    if files.room is not None and asked > files.room:
        raise ServiceError(f"--context is {asked} tokens, and the model has {files.room} positions; name fewer")
    return asked
