"""Error responses in OpenAI's format.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "model", "code": "unknown_model"}}

An unhandled exception is logged with the request id. The client receives the id only, because a traceback
or a path would disclose details of the server.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from http.client import responses
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vz_ray.video.errors import VideoError

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_MESSAGE_CHARS = 300
"""Maximum length of text from the request in an error message."""


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        message: The error and how to fix it; contains no path of the server.
        param: Path of the invalid field, such as `messages.0.content`.
        code: Machine-readable error code.
        retry_after_s: Value of the `retry-after` header, seconds; optional.
        headers: Additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after_s = param, code, retry_after_s
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's error type."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON body, also used for the error event of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the HTTP response."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        return JSONResponse(self.body(), self.status, headers)


def invalid_request(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """Return a 400 for an invalid request."""
    return ApiError(status, message, param=param, code=code)


def not_found(message: str, param: str | None = None, code: str | None = "not_found") -> ApiError:
    """Return a 404, also for objects of another owner."""
    return ApiError(404, message, param=param, code=code)


def unauthorized(message: str, code: str = "invalid_api_key") -> ApiError:
    """Return a 401 for a missing or invalid key."""
    return ApiError(401, message, code=code, headers={"www-authenticate": 'Bearer realm="vz_ray"'})


def overloaded(message: str, retry_after_s: float, status: int = 429) -> ApiError:
    """Return a 429 for too many requests of one key, or a 503 for too many requests in total."""
    code = "rate_limit_exceeded" if status == 429 else "overloaded"
    return ApiError(status, message, code=code, retry_after_s=retry_after_s)


def from_video_error(error: VideoError, param: str | None = None) -> ApiError:
    """Return a 400 for a video or image that cannot be used, without its path."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
    return invalid_request(f"{error.model_message[:1].upper()}{error.model_message[1:]}.", param, name)


def request_id(scope: Scope) -> str:
    """Return the request id for logs and the `x-request-id` header; a valid id of the client is kept."""
    state: dict[str, Any] = scope.setdefault("state", {})
    if "request_id" not in state:
        client_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        state["request_id"] = client_id if _ID.fullmatch(client_id) else f"req_{uuid.uuid4().hex}"
    return str(state["request_id"])


def install_error_handlers(app: FastAPI, response_headers: Mapping[str, str]) -> None:
    """Return all errors of `app` in OpenAI's format. Call it after all other middleware is added.

    Args:
        app: The application.
        response_headers: Added to each response that does not set them.
    """
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(_ErrorMiddleware, response_headers=response_headers)


class _ErrorMiddleware:
    """Outermost middleware: request ids, default headers, and responses to exceptions.

    If the request body was not read completely, the response closes the connection. Otherwise the server
    would read the rest of the declared length.
    """

    def __init__(self, app: ASGIApp, response_headers: Mapping[str, str]) -> None:
        self._app, self._response_headers = app, response_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._response_headers)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            log.info("Client disconnected: request %s", exchange.id)
        except Exception as error:
            if exchange.started:
                raise  # the server closes the connection, so the client detects the incomplete response
            await _to_api_error(error, exchange.id).response()(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, response_headers: Mapping[str, str]) -> None:
        self.id, self.started = request_id(scope), False
        self._response_headers = response_headers
        self._scope, self._receive, self._send = scope, receive, send
        self._plain_error: Message | None = None
        headers = Headers(scope=scope)
        self._body_unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self._body_unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_plain_error(message):
            self._plain_error = message
        elif self._plain_error is not None:
            if not message.get("more_body"):
                response, self._plain_error = _reformat(self._plain_error), None
                await response(self._scope, self.receive, self.send)
        else:
            await self._forward(message)

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID_HEADER] = self.id
            for name, value in self._response_headers.items():
                headers.setdefault(name, value)
            if self._body_unread:
                headers["connection"] = "close"
        await self._send(message)


def _is_plain_error(start: Message) -> bool:
    """Return True for an error response of a library in plain text or HTML."""
    content_type = Headers(raw=start["headers"]).get("content-type", "")
    return start["status"] >= 400 and content_type.partition(";")[0].strip() in ("text/plain", "text/html")


def _reformat(start: Message) -> Response:
    """Replace a library's error response by one in OpenAI's format."""
    original = Headers(raw=start["headers"])
    headers = {name: value for name, value in original.items() if name not in ("content-length", "content-type")}
    status = int(start["status"])
    phrase = responses.get(status, "rejected")
    return ApiError(status, f"The request failed with status {status}: {phrase}.", headers=headers).response()


def _to_api_error(error: Exception, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VideoError):
        return from_video_error(error)
    log.error("Unhandled exception in request %s", request_id, exc_info=error)
    message = f"Internal error; the server log contains details under {request_id}."
    return ApiError(500, message, code="internal_error")


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response()


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return a 400 with the first validation error, without the invalid value.

    Args:
        errors: `errors()` of a `ValidationError` of pydantic or FastAPI.
    """
    first = errors[0] if errors else {}
    if first.get("type") == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", "it cannot be parsed")
        return invalid_request(f"The body is not valid JSON: {reason}.", code="invalid_json")
    location = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path", "header")]
    param = ".".join(location)[:_MAX_MESSAGE_CHARS] or None
    message = str(first.get("msg", "the value is invalid"))[:_MAX_MESSAGE_CHARS]
    more = f" ({len(errors) - 1} more errors)" if len(errors) > 1 else ""
    code = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}.get(
        str(first.get("type")), "invalid_value"
    )
    return invalid_request(f"{param or 'The body'}: {message}{more}.", param, code)


_UNREADABLE = "There was an error parsing the body"
"""FastAPI's message if the JSON parser fails: nesting too deep, number too long."""


async def _http_error(request: Request, error: Exception) -> Response:
    """Convert an error of the framework; some have a message that is only the phrase of their status."""
    assert isinstance(error, HTTPException)
    detail, path = str(error.detail)[:_MAX_MESSAGE_CHARS], request.url.path[:_MAX_MESSAGE_CHARS]
    message, code = {
        "Not Found": (f"There is no endpoint {request.method} {path}.", "unknown_url"),
        "Method Not Allowed": (f"{path} does not support {request.method}.", "method_not_allowed"),
        _UNREADABLE: ("The body cannot be parsed as JSON.", "invalid_json"),
    }.get(detail, (detail, None))
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()
