"""Access control of the HTTP server, as ASGI middleware. Bodies and responses stream through.

    security headers -> error responses -> host -> origin -> API key -> content type
                     -> requests in progress -> size and rate of the body -> application

Without keys the server accepts loopback connections only. Pages of other sites must not reach it through
the user's browser. The host check blocks DNS rebinding; the origin and content type checks block forms.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vz_ray.config.serve import AccessConfig
from vz_ray.serve.api_errors import ApiError, install_error_handlers, invalid_request, overloaded, unauthorized
from vz_ray.serve.api_keys import ApiKey, ApiKeyStore
from vz_ray.serve.body_limits import BodyLimits, LimitedBody

SESSION_COOKIE = "vz_session"
SESSION_PATH = "/session"
UPLOADS_PATH = "/v1/files"
HEALTH_PATHS = frozenset({"/health", "/ready"})
"""Health checks of orchestrators: no key, any host."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Allows resources of this server only, nothing inline."""
_SECURITY_HEADERS = {
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
"""Maximum body size of a login, which has no key yet."""
_RETRY_S = 1.0
ANONYMOUS_OWNER = "local"
"""Owner id of requests to a server without keys."""


def install_access_control(app: FastAPI, config: AccessConfig, keys: ApiKeyStore | None) -> None:
    """Add access control, the `/session` routes and OpenAI's error format to `app`.

    Call it after all other middleware is added. Without keys, the caller must bind the server to loopback.
    """
    app.include_router(session_router(config, keys))
    app.add_middleware(AccessControl, config=config, keys=keys)
    install_error_handlers(app, _SECURITY_HEADERS)


def owner_id(request: Request) -> str:
    """Return the id of the request's API key."""
    return _owner(request.scope.get("state", {}).get("key"))


def _owner(key: ApiKey | None) -> str:
    return key.id if key else ANONYMOUS_OWNER


class AccessControl:
    """Middleware that authenticates and limits requests.

    Rejects a request with an `ApiError`. Stores the `ApiKey` of an accepted one in `scope["state"]["key"]`.
    """

    def __init__(self, app: ASGIApp, config: AccessConfig, keys: ApiKeyStore | None) -> None:
        self._app, self._config, self._keys = app, config, keys
        self._in_progress: Counter[str] = Counter()
        self._json = self._limits(int(config.max_json_mib * 2**20), config.json_timeout_s)
        self._upload = self._limits(int(config.max_upload_gib * 2**30), config.upload_timeout_s)
        self._login = self._limits(_LOGIN_BYTES, config.json_timeout_s)

    def _limits(self, max_bytes: int, timeout_s: float) -> BodyLimits:
        return BodyLimits(max_bytes, timeout_s, self._config.min_kib_per_s * 2**10, self._config.grace_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # not supported
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
        if self._keys is not None and key is None and not _is_public(path, method):
            raise _unauthorized(headers)
        if method in ("POST", "PUT", "PATCH"):
            _check_content_type(path, headers)
        scope.setdefault("state", {})["key"] = key
        await self._call_with_limits(_owner(key), scope, receive, send)

    async def _call_with_limits(self, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        path, max_requests = _route(scope), self._config.max_requests_per_key
        if self._in_progress[owner] >= max_requests and not _is_public(path, scope["method"]):
            raise overloaded(f"{max_requests} requests of this key are in progress; wait for one to finish.", _RETRY_S)
        limits = {UPLOADS_PATH: self._upload, SESSION_PATH: self._login}.get(path, self._json)
        body = LimitedBody(limits, scope, receive, send)
        self._in_progress[owner] += 1
        try:
            await self._app(scope, body.receive, body.send)
        except Exception as error:
            if body.refusal is not None and error is not body.refusal:
                raise body.refusal from error
            raise
        finally:
            body.close()
            self._in_progress[owner] -= 1
            if not self._in_progress[owner]:
                del self._in_progress[owner]

    def _check_host(self, headers: Headers) -> None:
        allowed = self._config.allowed_hosts
        if self._keys is not None and not allowed:
            return
        values = headers.getlist("host")
        host = _host_name(values[0]) if len(values) == 1 else ""
        if host not in allowed and not (self._keys is None and is_loopback(host)):
            message = "The host name is not in access.allowed_hosts of this server."
            raise ApiError(421, message, code="unknown_host")

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        host = _without_port(origin.lower().partition("://")[2])
        server = _without_port(headers.get("host", "").lower())
        is_allowed = host[0] in self._config.allowed_hosts and host[1] in ("", server[1])
        if not host[0] or (host != server and not is_allowed):
            raise ApiError(403, "Requests from pages of other sites are not allowed.", code="cross_origin")

    def _key(self, headers: Headers) -> ApiKey | None:
        if self._keys is None:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme:
            return self._keys.verify(secret.strip()) if scheme.lower() == "bearer" else None
        cookie = _cookie(headers)
        return self._keys.verify_session(cookie) if cookie else None


class _Login(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: Annotated[str, Field(max_length=256)]


def session_router(config: AccessConfig, keys: ApiKeyStore | None) -> APIRouter:
    """Log in with an API key: the browser gets an HTTP-only cookie instead of keeping the key."""
    router = APIRouter()

    @router.get(SESSION_PATH)
    async def session(request: Request) -> dict[str, Any]:
        key: ApiKey | None = request.state.key
        return {"needs_key": keys is not None and key is None, "name": key.name if key else None}

    @router.post(SESSION_PATH)
    async def log_in(login: _Login, request: Request) -> Response:
        if keys is None:
            return JSONResponse({"name": None})
        session_cookie = keys.create_session(login.key, config.session_hours)
        if session_cookie is None:
            raise unauthorized("The key is not valid; create one with `vz-ray keys create`.")
        cookie, key = session_cookie
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
    """Return the path without the prefix at which the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _is_public(path: str, method: str) -> bool:
    """Return True for the web page, which contains no user data, and for the login."""
    return path == SESSION_PATH or (method in _SAFE and (path == "/" or path.startswith("/static/")))


def _unauthorized(headers: Headers) -> ApiError:
    if "authorization" in headers:
        return unauthorized("The API key is not valid: it is wrong, expired or revoked.")
    if _cookie(headers):
        return unauthorized("The session has ended; log in again.", "session_ended")
    return unauthorized("An API key is required: `Authorization: Bearer vz-...`.", "missing_api_key")


def _check_content_type(path: str, headers: Headers) -> None:
    expected = "multipart/form-data" if path == UPLOADS_PATH else "application/json"
    if headers.get("content-type", "").partition(";")[0].strip().lower() != expected:
        raise invalid_request(f"The content-type must be {expected}.", code="unsupported_media_type", status=415)


def _cookie(headers: Headers) -> str:
    return cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE, "")


def _without_port(netloc: str) -> tuple[str, str]:
    """Return (host, port). The ports 80 and 443 become empty: a TLS proxy hides which one the client used."""
    host, port = netloc, ""
    after_brackets = netloc.rpartition("]")[2]
    if ":" in after_brackets:
        host, _, port = netloc.rpartition(":")
    return host, "" if port in ("80", "443") else port


def _host_name(host: str) -> str:
    name, port = _without_port(host.lower())
    return name if not port or port.isdecimal() else ""


def is_loopback(host: str) -> bool:
    """Return True for a loopback name or address. A server without keys must be bound to one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
