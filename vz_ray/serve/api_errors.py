"""Every error leaves as OpenAI's clients expect it, with the right status and without a secret.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "model", "code": "unknown_model"}}

What nobody foresaw is logged with the request's id, and the client is told that
id alone: a traceback or a path says where things are on the server.
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

from vz_ray.video.frame import VideoError

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_SHOWN = 300
"""Characters of a message; a client's own words may be part of it."""


class ApiError(Exception):
    """A request that is refused, as the client is told it.

    Attributes:
        status: HTTP status.
        message: For a person; names what is wrong and what would be right, no path of the server.
        type: One of OpenAI's: `invalid_request_error`, `authentication_error`, `rate_limit_error`, ...
        param: The field of the request that is wrong, such as `messages.0.content`.
        code: For a program.
        retry_after_s: Seconds after which it may be tried again.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.retry_after_s = param, code, retry_after_s
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """What the response holds; also what a stream sends when it fails midway."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The whole response."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        return JSONResponse(self.body(), self.status, headers)


def invalid_request(
    message: str, param: str | None = None, code: str | None = None, status: int = 400
) -> ApiError:
    """The client's mistake."""
    return ApiError(status, message, param=param, code=code)


def not_found(message: str, param: str | None = None, code: str | None = "not_found") -> ApiError:
    """There is no such thing, or it is someone else's."""
    return ApiError(404, message, param=param, code=code)


def unauthorized(message: str, code: str = "invalid_api_key") -> ApiError:
    """No key, or not a valid one."""
    return ApiError(
        401, message, "authentication_error", code=code, headers={"www-authenticate": 'Bearer realm="vz_ray"'}
    )


def too_large(message: str, param: str | None = None, code: str = "request_too_large") -> ApiError:
    """More bytes than a limit allows."""
    return ApiError(413, message, param=param, code=code)


def overloaded(message: str, retry_after_s: float, status: int = 429) -> ApiError:
    """Too much at once: of this key (429) or of everybody (503)."""
    kind = "rate_limit_error" if status == 429 else "server_error"
    code = "rate_limit_exceeded" if status == 429 else "overloaded"
    return ApiError(status, message, kind, code=code, retry_after_s=retry_after_s)


def server_error(message: str, code: str | None = "internal_error", status: int = 500) -> ApiError:
    """Not the client's fault."""
    return ApiError(status, message, "server_error", code=code)


def from_video_error(error: VideoError, param: str | None = None) -> ApiError:
    """A video or image that cannot be used, in the words without a path."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
    return invalid_request(f"{error.model_message[:1].upper()}{error.model_message[1:]}.", param, name)


def request_id(scope: Scope) -> str:
    """The id that the response will carry, and the log."""
    state: dict[str, Any] = scope.setdefault("state", {})
    if "request_id" not in state:
        told = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        state["request_id"] = told if _ID.fullmatch(told) else f"req_{uuid.uuid4().hex}"
    return str(state["request_id"])


def install_error_handlers(app: FastAPI) -> None:
    """Makes every error of `app` leave in this form; call it after other middleware was added."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(VideoError, _video_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(_Answering)


class _Answering:
    """The outermost layer: request ids, and an answer to whatever no one inside has answered.

    A response to a request whose body was not read to its end closes the
    connection: the server would otherwise read on, up to whatever was declared.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            log.info("%s: the client went away", exchange.id)
        except Exception as error:
            if exchange.started:
                raise  # the server logs it and cuts the connection: the client must not take it for complete
            await _answer(error, exchange.id).response()(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.id, self.started = request_id(scope), False
        self._scope, self._receive, self._send = scope, receive, send
        self._bare: Message | None = None
        headers = Headers(scope=scope)
        self._unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_bare(message):
            self._bare = message
        elif self._bare is not None:
            if not message.get("more_body"):
                refusal, self._bare = _dressed(self._bare), None
                await refusal(self._scope, self.receive, self.send)
        else:
            await self._pass(message)

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID_HEADER] = self.id
            if self._unread:
                headers["connection"] = "close"
        await self._send(message)


def _is_bare(start: Message) -> bool:
    """Whether this begins an error that some library says in a text of its own."""
    kind = Headers(raw=start["headers"]).get("content-type", "")
    return start["status"] >= 400 and kind.partition(";")[0].strip() in ("text/plain", "text/html")


def _dressed(start: Message) -> Response:
    told = Headers(raw=start["headers"])
    kept = {name: value for name, value in told.items() if name not in ("content-length", "content-type")}
    status = int(start["status"])
    phrase = responses.get(status, "refused")
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return ApiError(
        status, f"The request was answered with {status}: {phrase}.", kind, headers=kept
    ).response()


def _answer(error: Exception, id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VideoError):
        return from_video_error(error)
    log.error("request %s failed in a way that nobody foresaw", id, exc_info=error)
    return server_error(f"The server failed on this request; its log has more under {id}.")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _video_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, VideoError)
    return from_video_error(error).response()


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response()


def validation_error(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong, the first of it, without the value that was sent.

    Args:
        found: `error.errors()` of pydantic's ValidationError or FastAPI's.
    """
    first = found[0] if found else {}
    if first.get("type") == "json_invalid":
        why = (first.get("ctx") or {}).get("error", "it cannot be read")
        return invalid_request(f"The body is not valid JSON: {why}.", code="invalid_json")
    place = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path", "header")]
    param = ".".join(place)[:_MOST_SHOWN] or None
    what = str(first.get("msg", "the request is not as it should be"))[:_MOST_SHOWN]
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    code = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}.get(
        str(first.get("type")), "invalid_value"
    )
    return invalid_request(f"{param or 'The body'}: {what}{more}.", param, code)


_UNREADABLE = "There was an error parsing the body"
"""FastAPI's words for what the JSON parser gives up on: too deep, too long a number."""
_HTTP_MESSAGES = {
    404: "There is no such address: {method} {path}.",
    405: "{path} does not take {method}.",
}


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and error.detail == _UNREADABLE:
        return invalid_request("The body cannot be read as JSON.", code="invalid_json").response()
    shown = _HTTP_MESSAGES.get(error.status_code, "{detail}") if _plain(error) else "{detail}"
    message = shown.format(
        method=request.method, path=request.url.path[:_MOST_SHOWN], detail=str(error.detail)[:_MOST_SHOWN]
    )
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, kind, code=code, headers=dict(error.headers or {})).response()


def _plain(error: HTTPException) -> bool:
    """Whether nobody has said more than the status does."""
    return str(error.detail) in ("Not Found", "Method Not Allowed")
