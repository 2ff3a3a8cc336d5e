"""Access control of the viewer: local pages on loopback, requests with the key elsewhere.

Against DNS rebinding (a foreign name that resolves to 127.0.0.1), the `Host` header is checked; numeric
addresses cannot be rebound. Every response has headers that disable all browser features the page does not need.
"""

from __future__ import annotations

import ipaddress
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "vz_ray_view"

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Return whether `host` is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_host(header: str) -> str:
    """Return the host of a `Host` header: `[::1]:80` -> `::1`, `localhost:80` -> `localhost`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if header.count(":") == 1 else header


class ViewerAccessControl:
    """ASGI middleware: reject foreign requests with status 403 and set the security headers.

    Args:
        app: Application behind the middleware.
        host: Address that the server is bound to.
        key: Access key, required unless `host` is loopback. The browser stores it as a cookie after the
            first request with `?key=`.
    """

    def __init__(self, app: ASGIApp, *, host: str, key: str = "") -> None:
        self.app, self.host, self.key = app, host, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        await (self.refusal(scope) or self.app)(scope, receive, with_headers)

    def refusal(self, scope: Scope) -> ASGIApp | None:
        """Return the response to a request that is not allowed; None if it is allowed."""
        headers = Headers(scope=scope)
        if not self.is_known_host(parse_host(headers.get("host", "").lower())):
            return PlainTextResponse("403: use the address that `vz-ray view` printed", 403)
        if not self.key:
            return None
        query_key = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        if self.is_valid_key(query_key):
            response = RedirectResponse(scope["path"], 303)
            response.set_cookie(COOKIE, self.key, httponly=True, samesite="strict")
            return response
        if self.is_valid_key(_cookie(headers.get("cookie", ""))):
            return None
        return PlainTextResponse("403: open the full address that `vz-ray view` printed, including the key", 403)

    def is_known_host(self, host: str) -> bool:
        """Return whether a request with this host header is for this server."""
        if host == self.host or is_loopback(host):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return not is_loopback(self.host)

    def is_valid_key(self, key: str) -> bool:
        """Compare in constant time."""
        return secrets.compare_digest(key.encode(), self.key.encode())


def _cookie(header: str) -> str:
    try:
        cookie = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""
