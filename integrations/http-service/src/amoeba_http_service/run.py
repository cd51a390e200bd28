"""From an elastic checkpoint, or deployed files, to a server that listens, until it is told to end."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from amoeba_http_service.app import create_app
from amoeba_http_service.resident import How, Resident, make_resident
from amoeba_http_service.resident_files import files_resident
from amoeba_http_service.settings import Door, Limits
from amoeba_plugin.deployment.deployed import is_deployed
from amoeba_plugin.errors import ArtifactError, ServiceError
from amoeba_plugin.runtime.messages import done, say

PENDING = 128  # connections that the system keeps until they are taken
ENDS = (signal.SIGINT, signal.SIGTERM)


def run_server(models: Sequence[Path], how: How, limits: Limits, door: Door) -> None:
    """Serve until SIGTERM or Ctrl-C, which finish what runs; a second Ctrl-C does not wait for it.

    Args:
        models: An elastic checkpoint, or directories that ``amoeba deploy`` wrote.
        how: Profile, decider, threads.
        limits: Of requests.
        door: Where to listen, and who may ask.

    Raises:
        ServiceError: If others could reach it without a token, or the address cannot be had.
        AmoebaError: As :func:`~amoeba_http_service.resident.make_resident` and
            :func:`~amoeba_http_service.resident_files.files_resident`.
    """
    door.require_safe()
    with listening(door) as sock, made_resident(models, how, limits) as resident:  # an address before anything is done
        config = uvicorn.Config(
            create_app(resident, limits, door), http="h11", ws="none", lifespan="on", log_level="warning",
            access_log=False, server_header=False,
        )  # fmt: skip
        done(f"{resident.name} answers at {address(sock)}/v1, its page is {address(sock)}/ (Ctrl-C ends it)")
        server = uvicorn.Server(config)
        with ending_quietly():
            server.run([sock])
    say("ended at once; what ran was cut off" if server.force_exit else "ended; what ran was finished")


@contextlib.contextmanager
def made_resident(models: Sequence[Path], how: How, limits: Limits) -> Iterator[Resident]:
    """Make ready what was named, for a block of code; what runs has finished by its end, or is cut off there.

    Raises:
        ArtifactError: If there are several models, of which not all are deployed files.
    """
    others = [each for each in models if not is_deployed(each)]
    if not others:
        with files_resident(models, how, limits) as resident:
            yield resident
        return
    if len(models) > 1:
        raise ArtifactError(
            f"{others[0]} is nothing that `amoeba deploy` wrote: an elastic checkpoint is served alone, for it has all "
            "shapes, and deployed files side by side; name one of it, or directories of those"
        )
    resident = make_resident(models[0], how, limits)
    try:
        yield resident
    finally:
        resident.service.close(finish=False)


@contextlib.contextmanager
def listening(door: Door) -> Iterator[socket.socket]:
    """Take an address.

    Raises:
        ServiceError: If it is another program's, or none of this machine's.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(door.host, door.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise _not_to_be_had(door, error) from error
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(place)
            sock.listen(PENDING)
        except OSError as error:
            raise _not_to_be_had(door, error) from error
        yield sock


def _not_to_be_had(door: Door, error: OSError) -> ServiceError:
    return ServiceError(
        f"{door.host}, port {door.port}, cannot be listened on ({error.strerror or error}); name another --port, or an "
        "address of this machine"
    )


def address(sock: socket.socket) -> str:
    """Return where clients find a socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def ending_quietly() -> Iterator[None]:
    """Have the signals that uvicorn ends by, and sends itself again when it has, end nothing more."""
    before = {each: signal.signal(each, lambda *_: None) for each in ENDS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
