"""Who may ask: on loopback pages of this machine alone, elsewhere whoever has the key.

A page from elsewhere can have its own name resolve to 127.0.0.1 and then read
what a server there answers; the `Host` header tells (DNS rebinding). A numeric
address cannot be rebound. Every answer forbids the browser all that the page
does not need.
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
    """Whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """`[::1]:80` -> `::1`, `localhost:80` -> `localhost`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if header.count(":") == 1 else header


class AccessControl:
    """Refuses, with status 403, what does not come from the page itself; sets the headers of all answers.

    Args:
        app: Whom allowed requests go to.
        host: What the server is bound to.
        key: Who has it may ask, from wherever; needed unless `host` is loopback. Given once as
            `?key=` of the page, the browser keeps it.
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
        """What is answered in place of the page; None where the request is allowed."""
        headers = Headers(scope=scope)
        if not self.is_known_host(host_of(headers.get("host", "").lower())):
            return PlainTextResponse(
                "403: this server answers only to the address that `vz-ray view` printed", 403
            )
        if not self.key:
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        if self.is_valid_key(given):
            answer = RedirectResponse(scope["path"], 303)
            answer.set_cookie(COOKIE, self.key, httponly=True, samesite="strict")
            return answer
        if self.is_valid_key(_cookie(headers.get("cookie", ""))):
            return None
        return PlainTextResponse("403: open the whole address that `vz-ray view` printed, key included", 403)

    def is_known_host(self, host: str) -> bool:
        """Whether a request for this host is meant for this server."""
        if host == self.host or is_loopback(host):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return not is_loopback(self.host)

    def is_valid_key(self, key: str) -> bool:
        return secrets.compare_digest(key.encode(), self.key.encode())


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""
