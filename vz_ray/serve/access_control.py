"""What every request passes before the application sees it.

    headers that browsers heed -> answers to errors -> host -> origin -> key -> kind of body
                               -> requests in progress -> size and pace of the body -> application

Plain ASGI: bodies and responses stream through. Without keys the server is for
this machine alone, and a page from elsewhere must not reach it through the
user's browser: neither by a name of its own that points here (the host is
checked) nor by a form (the origin and the kind of body are).
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vz_ray.config.serve import AccessConfig
from vz_ray.serve.api_errors import (
    ApiError,
    install_error_handlers,
    invalid_request,
    overloaded,
    unauthorized,
)
from vz_ray.serve.api_keys import ApiKey, ApiKeyStore
from vz_ray.serve.body_limits import BodyLimits, LimitedBody

SESSION_COOKIE = "vz_session"
SESSION_PATH = "/session"
UPLOADS_PATH = "/v1/files"
HEALTH_PATHS = frozenset({"/health", "/ready"})
"""Asked by orchestrators, by address and without a key."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Content security policy: everything from this server, nothing inline."""
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_LOGIN_BYTES = 4096
"""Largest body that is read of who has shown no key yet."""
_RETRY_S = 1.0
ANONYMOUS_OWNER = "local"
"""Who asks where there are no keys."""


def install_access_control(app: FastAPI, config: AccessConfig, keys: ApiKeyStore | None) -> None:
    """Puts `app` behind the guard, gives it `/session`, and makes its errors OpenAI's.

    Call it after other middleware was added. Without keys, whoever starts the
    server must bind it to loopback.
    """
    app.include_router(session_router(config, keys))
    app.add_middleware(AccessControl, config=config, keys=keys)
    install_error_handlers(app)
    app.add_middleware(_SecurityHeaders)


def request_owner(request: Request) -> str:
    """Whose request this is: the id of its key."""
    key: ApiKey | None = request.scope.get("state", {}).get("key")
    return key.id if key else ANONYMOUS_OWNER


class AccessControl:
    """Refuses by raising `ApiError`; what passes has its `Key`, if any, in `scope["state"]["key"]`."""

    def __init__(self, app: ASGIApp, config: AccessConfig, keys: ApiKeyStore | None) -> None:
        self._app, self._config, self._keys = app, config, keys
        self._busy: Counter[str] = Counter()
        self._json = self._limits(int(config.max_json_mib * 2**20), config.json_timeout_s)
        self._upload = self._limits(int(config.max_upload_gib * 2**30), config.upload_timeout_s)
        self._login = self._limits(_LOGIN_BYTES, config.json_timeout_s)

    def _limits(self, size: int, seconds: float) -> BodyLimits:
        return BodyLimits(size, seconds, self._config.min_kib_per_s * 1e3, self._config.grace_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # nothing here speaks it
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = _route(scope), scope["method"]
        if path in HEALTH_PATHS and method in _SAFE:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        self._check_host(headers)
        if method not in _SAFE:
            self._check_origin(headers)
        key = self._key(headers)
        if self._keys is not None and key is None and not _is_open(path, method):
            raise _unauthorized(headers)
        if method in ("POST", "PUT", "PATCH"):
            _check_kind(path, headers)
        scope.setdefault("state", {})["key"] = key
        await self._admitted(key, scope, receive, send)

    async def _admitted(self, key: ApiKey | None, scope: Scope, receive: Receive, send: Send) -> None:
        who = key.id if key else ANONYMOUS_OWNER
        if self._busy[who] >= self._config.max_requests_per_key and not _is_open(
            _route(scope), scope["method"]
        ):
            raise overloaded(
                f"{self._config.max_requests_per_key} requests of this key are in progress; wait for one to end.",
                _RETRY_S,
            )
        self._busy[who] += 1
        try:
            await self._limited(scope, receive, send)
        finally:
            self._busy[who] -= 1
            if not self._busy[who]:
                del self._busy[who]

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _route(scope)
        limits = self._upload if path == UPLOADS_PATH else self._login if path == SESSION_PATH else self._json
        body = LimitedBody(limits, scope, receive, send)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception as error:
            if body.refusal is not None and error is not body.refusal:
                raise body.refusal from error
            raise
        finally:
            body.close()

    def _check_host(self, headers: Headers) -> None:
        allowed = self._config.allowed_hosts
        if self._keys is not None and not allowed:
            return
        told = headers.getlist("host")
        host = _host_name(told[0]) if len(told) == 1 else ""
        if host not in allowed and not (self._keys is None and is_loopback(host)):
            raise ApiError(
                421,
                "This server is not known by the name that it was asked by (guard.allowed_hosts).",
                code="unknown_host",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        host = _without_port(origin.lower().partition("://")[2])
        own = _without_port(headers.get("host", "").lower())
        known = host[0] in self._config.allowed_hosts and host[1] in ("", own[1])
        if not host[0] or (host != own and not known):
            raise ApiError(
                403,
                "A page of another site must not do this.",
                "permission_error",
                code="cross_origin",
            )

    def _key(self, headers: Headers) -> ApiKey | None:
        if self._keys is None:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme:
            return self._keys.verify(secret.strip()) if scheme.lower() == "bearer" else None
        cookie = _cookie(headers)
        return self._keys.verify_session(cookie) if cookie else None


class _SecurityHeaders:
    """What browsers heed, on every response that does not say otherwise."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)


class _Login(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: Annotated[str, Field(max_length=256)]


def session_router(config: AccessConfig, keys: ApiKeyStore | None) -> APIRouter:
    """How a page in a browser shows a key once: a cookie that scripts cannot read takes its place."""
    router = APIRouter()

    @router.get(SESSION_PATH)
    async def session(request: Request) -> dict[str, Any]:
        key: ApiKey | None = request.state.key
        return {"needs_key": keys is not None and key is None, "name": key.name if key else None}

    @router.post(SESSION_PATH)
    async def log_in(login: _Login, request: Request) -> Response:
        if keys is None:
            return JSONResponse({"name": None})
        opened = keys.create_session(login.key, config.session_hours)
        if opened is None:
            raise unauthorized("This key is not valid; `vz-ray keys create` makes one.")
        cookie, key = opened
        response = JSONResponse({"name": key.name})
        response.set_cookie(
            SESSION_COOKIE,
            cookie,
            max_age=int(config.session_hours * 3600),
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    @router.delete(SESSION_PATH)
    async def log_out() -> Response:
        response = Response(status_code=204)
        response.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")
        return response

    return router


def _route(scope: Scope) -> str:
    """The path below where the application is mounted, as its router sees it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _is_open(path: str, method: str) -> bool:
    """The page itself, which holds no one's data, and the way to show a key."""
    return path == SESSION_PATH or (method in _SAFE and (path == "/" or path.startswith("/static/")))


def _unauthorized(headers: Headers) -> ApiError:
    if "authorization" in headers:
        return unauthorized("This API key is not valid: it is wrong, expired or revoked.")
    if _cookie(headers):
        return unauthorized("The session has ended; show the key again.", "session_ended")
    return unauthorized("An API key is needed: `Authorization: Bearer vz-...`.", "missing_api_key")


def _check_kind(path: str, headers: Headers) -> None:
    wanted = "multipart/form-data" if path == UPLOADS_PATH else "application/json"
    if headers.get("content-type", "").partition(";")[0].strip().lower() != wanted:
        raise invalid_request(
            f"The content-type must be {wanted}.", code="unsupported_media_type", status=415
        )


def _cookie(headers: Headers) -> str:
    return cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE, "")


def _without_port(netloc: str) -> tuple[str, str]:
    """(host, port), the usual ports left out, since an encrypting proxy hides which one it was."""
    host, port = netloc, ""
    bare = netloc.rpartition("]")[2]
    if ":" in bare:
        host, _, port = netloc.rpartition(":")
    return host, "" if port in ("80", "443") else port


def _host_name(host: str) -> str:
    name, port = _without_port(host.lower())
    return name if not port or port.isdecimal() else ""


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's alone; a server without keys must be bound to one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
