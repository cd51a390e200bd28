"""How much a server takes of a request, where it listens, and who may ask."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from amoeba_plugin.errors import ServiceError

TOKEN = "AMOEBA_SERVE_TOKEN"  # the name of a variable of the environment
DEFAULT_ANSWER, SHORT_ANSWER = 256, 16  # tokens, of a chat and of a completion that name none
LEAST_TOKEN = 16  # characters of a bearer token: fewer are guessed


@dataclass(frozen=True)
class Limits:
    """The most that a request may be.

    Attributes:
        body: Bytes.
        prompt: Tokens; ``None``: what the model has positions for.
        answer: Tokens.
        waiting: Requests that were taken and are not done.
    """

    body: int = 2**20
    prompt: int | None = None
    answer: int = 1024
    waiting: int = 64


@dataclass(frozen=True)
class Door:
    """Where a server listens, and who may ask.

    Attributes:
        host: An address or a name.
        port: 0: any that is free.
        token: That requests must bring; empty: none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = field(default="", repr=False)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def names(self) -> frozenset[str]:
        """What the header ``Host`` may say where no token is needed: a page of anybody's may name its own host ours."""
        return frozenset({"127.0.0.1", "localhost", "[::1]", self.host, f"[{self.host}]"})

    def require_safe(self) -> None:
        """Refuse to be reached by others without a token.

        Raises:
            ServiceError: If that is so, or the token is short.
        """
        if not self.is_local and not self.token:
            raise ServiceError(
                f"{self.host} is reached by other machines, and nobody would have to say who they are; set {TOKEN} to "
                f"a secret of {LEAST_TOKEN} characters or more, which clients send as their API key, or listen on "
                "127.0.0.1"
            )
        if self.token and len(self.token) < LEAST_TOKEN:
            raise ServiceError(f"{TOKEN} has {len(self.token)} characters; take {LEAST_TOKEN} or more")
