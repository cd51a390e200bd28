"""Refusals in OpenAI's form: the right status, what was asked, what is possible."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from amoeba_http_service.asked import UnknownModelError
from amoeba_http_service.bodies import Body, ChatBody, CompletionBody
from amoeba_plugin.errors import AmoebaError, BusyError, ServiceError, SloError, did_you_mean, shortened

logger = logging.getLogger(__name__)
LONGEST_WAIT = 600  # seconds, that a client is told to wait
BODIES: Mapping[str, type[Body]] = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}
CODES = {400: "bad_request", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class Json(Response):
    """JSON of ASCII alone: what repeats half a surrogate pair of a request can be sent, too."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered.

    Attributes:
        status: Of HTTP.
        message: For people.
        code: For programs.
        param: The field that it is about.
        headers: Of the response.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        told = {"message": shortened(self.message), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def response(self) -> Response:
        """What is sent, with its status."""
        return Json(self.fields, self.status, dict(self.headers))


def refusal_of(error: AmoebaError, backlog: float = 0.0, closing: bool = False) -> Refusal:
    """Return what an error of the service means to a client.

    Args:
        error: That the request met.
        backlog: Seconds until all that was taken is done.
        closing: The server is about to end.
    """
    later = {"Retry-After": str(min(max(math.ceil(backlog), 1), LONGEST_WAIT))}
    if isinstance(error, UnknownModelError):
        return Refusal(404, str(error), "model_not_found", "model")
    if isinstance(error, BusyError):
        return Refusal(429, str(error), "slo_busy", "slo", later)
    if isinstance(error, SloError):
        return Refusal(422, str(error), "slo_not_possible", "slo")
    if isinstance(error, ServiceError):
        return Refusal(503 if closing else 429, str(error), "closing" if closing else "too_many_waiting", None, later)
    return Refusal(422, str(error), "invalid_request")


def install(app: FastAPI) -> None:
    """Have everything that goes wrong told in OpenAI's form."""

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return invalid(error.errors(), request.url.path).response

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = CODES.get(error.status_code, "error")
        return Refusal(error.status_code, str(error.detail), code, headers=error.headers or {}).response

    async def unforeseen(request: Request, error: Exception) -> Response:
        return Refusal(500, "the server failed; its log says why", "internal_error").response

    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)


def invalid(errors: Sequence[Any], path: str) -> Refusal:
    """Return what is wrong with a body.

    Args:
        errors: Of pydantic, one at least.
        path: Where the request went.
    """
    error = errors[0]
    where = [str(each) for each in error["loc"] if each != "body"]
    param = ".".join(where)
    if error["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {error['ctx']['error']} at character {param}", "invalid_json")
    if error["type"] == "extra_forbidden":
        return Refusal(422, _unknown(where, path), "unknown_field", param)
    if not where and error["type"] in ("model_attributes_type", "missing"):
        status = 422 if error["type"] == "missing" else 415
        return Refusal(status, "the body must be a JSON object, sent as Content-Type: application/json", "invalid_body")
    message = str(error["msg"]).removeprefix("Value error, ")
    return Refusal(422, f"{param or 'the body'}: {message[:1].lower()}{message[1:]}", "invalid_field", param or None)


def _unknown(where: Sequence[str], path: str) -> str:
    """Return what is said of a field that there is not."""
    name, body = where[-1], BODIES.get(path)
    if len(where) > 1 or body is None:
        return f"there is no field {'.'.join(where)}; leave it out"
    return f"there is no field '{name}'.{did_you_mean(name, body.model_fields)} Leave it out, or correct it"
