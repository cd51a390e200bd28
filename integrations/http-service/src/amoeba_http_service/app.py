"""The routes: chats, completions, models, health, metrics, and a page to try it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from amoeba_http_service.asked import AUTO, Asked, asked_of, shape_named
from amoeba_http_service.bodies import ChatBody, CompletionBody
from amoeba_http_service.errors import Json, Refusal, install, refusal_of
from amoeba_http_service.following import Following
from amoeba_http_service.guard import Guard
from amoeba_http_service.metrics import Metrics
from amoeba_http_service.replies import Reply
from amoeba_http_service.resident import Resident
from amoeba_http_service.settings import Door, Limits
from amoeba_plugin._version import __version__
from amoeba_plugin.errors import AmoebaError
from amoeba_plugin.serving.answer import Answer

PAGE = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
EVENTS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
GONE = 499  # what servers log of a client that went away
TYPICAL = 128  # tokens of the prompt for which models tell their time to the first token


@dataclass
class Server:
    """What the routes share.

    Attributes:
        resident: The model.
        limits: Of requests.
        metrics: What is counted.
        created: When it began, seconds since 1970.
        closing: It takes no more requests.
    """

    resident: Resident
    limits: Limits
    metrics: Metrics
    created: int = field(default_factory=lambda: time.time_ns() // 10**9)
    closing: bool = False

    async def answer(self, body: ChatBody | CompletionBody, request: Request) -> Response:
        """Answer a chat or a completion, as one or as a stream."""
        taken = await run_in_threadpool(self._take, body)
        if isinstance(taken, Refusal):
            self.metrics.refused(taken.code)
            return taken.response
        asked, answer = taken
        following = Following(answer, self.resident.tokenizer, asked.stops, partial(self.metrics.ended, asked))
        reply = Reply(asked, answer, self.resident.tokenizer)
        if asked.is_streamed:
            return StreamingResponse(
                _events(reply, following), media_type="text/event-stream", headers=EVENTS,
                background=BackgroundTask(answer.cancel),  # where the client was gone before it began
            )  # fmt: skip
        return await _whole(reply, following, request)

    def models(self) -> list[dict[str, Any]]:
        """Return ``auto`` and all shapes, each with what it takes."""
        return [self.model(name) for name in (AUTO, *map(str, self.resident.space))]

    def model(self, name: str) -> dict[str, Any]:
        """Return what clients are told of a model.

        Raises:
            UnknownModelError: If there is none of that name.
        """
        resident = self.resident
        shape = shape_named(name, resident)
        latency = resident.latency_of(shape or resident.space.largest, TYPICAL)
        told = {
            "of": resident.name, "shape": None if shape is None else str(shape), "chat": resident.texts.chats,
            "ttft_ms": round(latency.ttft * 1e3, 3), "tpot_ms": round(latency.tpot * 1e3, 3),
            "ttft_tokens": TYPICAL, "context": resident.backend.context,
            "max_tokens": self.limits.answer,
        }  # fmt: skip
        return {"id": name, "object": "model", "created": self.created, "owned_by": "amoeba", "amoeba": told}

    def _take(self, body: ChatBody | CompletionBody) -> tuple[Asked, Answer] | Refusal:
        """Hand a request to the service, which may take a while: it is played through with all that wait."""
        try:
            asked = asked_of(body, self.resident, self.limits)
            return asked, self.resident.service.ask(asked.request)
        except AmoebaError as error:
            return refusal_of(error, self.resident.service.backlog, self.closing)


def create_app(resident: Resident, limits: Limits, door: Door) -> FastAPI:
    """Return the application; its end finishes what runs.

    Args:
        resident: The model.
        limits: Of requests.
        door: Who may ask.
    """
    server = Server(resident, limits, Metrics(resident))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.closing = True
        await run_in_threadpool(resident.service.close)

    app = FastAPI(
        title=f"amoeba serve: {resident.name}", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
    )  # fmt: skip
    app.add_middleware(Guard, door=door, most=limits.body)
    app.state.server = server
    install(app)
    _add_answers(app, server)
    _add_models(app, server)
    _add_page(app)
    return app


def _add_answers(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", response_class=Json)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a chat; its last message is never cut."""
        return await server.answer(body, request)

    @app.post("/v1/completions", response_class=Json)
    async def completion(body: CompletionBody, request: Request) -> Response:
        """Go on with a text; what of it is context may be cut."""
        return await server.answer(body, request)


def _add_models(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", response_class=Json)
    def models() -> Response:
        """List auto, and every shape by name."""
        return Json({"object": "list", "data": server.models()})

    @app.get("/v1/models/{name:path}", response_class=Json)
    def model(name: str) -> Response:
        """Tell of one of them."""
        try:
            return Json(server.model(name))
        except AmoebaError as error:
            return refusal_of(error).response

    @app.get("/health", response_class=Json)
    def health() -> Response:
        """Tell whether requests are taken."""
        status = "closing" if server.closing else "ok"
        return Json({"status": status, "model": server.resident.name}, 503 if server.closing else 200)

    @app.get("/metrics")
    def metrics() -> Response:
        """Tell what was done, for Prometheus."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in TYPES}

    def sent(name: str) -> Response:
        if name not in files:
            return Refusal(404, f"there is no {name}", "not_found").response
        return Response(files[name], media_type=TYPES[Path(name).suffix], headers=SAFE)

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return sent("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    def page_file(name: str) -> Response:
        return sent(name)


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, allow_nan=False, separators=(',', ':'))}\n\n"


async def _events(reply: Reply, following: Following) -> AsyncGenerator[str, None]:
    """Yield an answer as server-sent events."""
    yield _event(reply.first())
    async for shown in following.shown():
        if shown.text or shown.tokens:
            yield _event(reply.chunk(shown))
    ended = _how(following)
    if isinstance(ended, Refusal):
        yield _event(ended.fields)
        return
    yield _event(reply.last(ended))
    if reply.asked.with_usage:
        yield _event(reply.usage_chunk(following.produced))
    yield "data: [DONE]\n\n"


async def _whole(reply: Reply, following: Following, request: Request) -> Response:
    """Return an answer as one; a client that goes away meanwhile cancels it."""
    async with anyio.create_task_group() as group:
        group.start_soon(_when_gone, request, following.answer.cancel)
        shown = [each async for each in following.shown()]
        group.cancel_scope.cancel()
    ended = _how(following)
    if isinstance(ended, Refusal):
        return ended.response
    return Json(reply.whole(shown, ended, following.produced))


async def _when_gone(request: Request, do: Callable[[], object]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    do()


def _how(following: Following) -> str | Refusal:
    """Return why an answer ended, in OpenAI's word, or what is sent where it did not."""
    answer = following.answer
    if following.stopped or answer.end == "stop":
        return "stop"
    if answer.end == "length":
        return "length"
    if answer.end == "cancelled":
        return Refusal(GONE, "the answer was cancelled", "cancelled")
    return Refusal(500, "the model failed on this request; the server's log says why", "model_failed")
