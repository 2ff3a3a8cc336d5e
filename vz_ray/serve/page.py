"""The page at `/`, for people: watch the agent look at a video.

What a browser may be given is read once, into a table by address; a request's
path is looked up there, and never opened. Pages and modules name each other by
relative addresses, so that they work wherever the application is mounted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""What is served, by the ending of its name."""


@dataclass(frozen=True, slots=True)
class StaticAsset:
    """A file that browsers are given.

    Attributes:
        tag: Its ETag: browsers ask each time whether it is still the same, and a new server is seen at once.
    """

    content: bytes
    media_type: str
    tag: str

    @classmethod
    def load(cls, entry: Traversable) -> StaticAsset:
        content = entry.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        return cls(content, CONTENT_TYPES[PurePath(entry.name).suffix], tag)

    def response(self, request: Request) -> Response:
        headers = {"etag": self.tag, "cache-control": "no-cache"}
        told = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if self.tag in told:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def load_page_assets() -> dict[str, StaticAsset]:
    """Every file of the page by its address: `/`, `/static/*` its own, `/static/web/*` what pages share."""
    own = files("vz_ray.serve").joinpath("static")
    found = {"/": StaticAsset.load(own.joinpath("index.html"))}
    for prefix, folder in (("/static", own), ("/static/web", files("vz_ray.web"))):
        for entry in folder.iterdir():
            if PurePath(entry.name).suffix in CONTENT_TYPES and entry.name != "index.html":
                found[f"{prefix}/{entry.name}"] = StaticAsset.load(entry)
    return found


def page_router() -> APIRouter:
    """Serves the page."""
    router = APIRouter()
    for path, asset in load_page_assets().items():
        router.add_api_route(path, _answering(asset), methods=["GET", "HEAD"])
    return router


def _answering(asset: StaticAsset) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return asset.response(request)

    return answer
