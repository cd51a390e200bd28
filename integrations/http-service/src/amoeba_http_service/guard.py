"""Who may ask, by the bearer token or, where there is none, by naming this machine; and how much a body may be."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from amoeba_http_service.errors import Refusal
from amoeba_http_service.settings import TOKEN, Door

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN = ("/", "/health")  # and the page's files: they say nothing of anybody's requests
PAGE = "/page/"


class Guard:
    """Stands in front of an application.

    Args:
        app: Whose requests it looks at.
        door: Who may ask.
        most: Bytes of a body.
    """

    def __init__(self, app: App, door: Door, most: int) -> None:
        self._app, self._door, self._most = app, door, most
        self._wanted = f"bearer {door.token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, self._counted(receive), send)
        else:
            await refusal.response(scope, receive, send)

    def _counted(self, receive: Receive) -> Receive:
        """Return what receives a body, up to the limit, whatever length it said it has."""
        left = self._most

        async def counted() -> Any:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"a body may have {self._most} bytes; send a shorter prompt")
            return message

        return counted

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = dict(scope["headers"])
        if not self._door.token:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() in self._door.names:
                return None
            return Refusal(403, f"the header Host names '{host}', and this is {self._door.host}", "wrong_host")
        if scope["path"] in OPEN or scope["path"].startswith(PAGE):
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if hmac.compare_digest(scheme.lower() + b" " + given.strip(), self._wanted):
            return None
        return Refusal(
            401, f"this server wants the token of its {TOKEN}: Authorization: Bearer TOKEN", "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip
