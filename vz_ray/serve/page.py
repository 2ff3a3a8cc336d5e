"""The web page at `/`: ask about a video and watch the agent's zooms.

All files are loaded once into a table by URL path. A request path is a key of this table and is never
opened as a file. Links are relative, so the application can be mounted at any path.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Content type by file suffix; other files are not served."""


@dataclass(frozen=True, slots=True)
class StaticAsset:
    """A static file in memory.

    Attributes:
        content: Content of the file.
        media_type: Content type.
        etag: Hash of the content. Browsers revalidate each time, so they load a new version at once.
    """

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def load(cls, entry: Traversable) -> StaticAsset:
        content = entry.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        return cls(content, CONTENT_TYPES[PurePath(entry.name).suffix], etag)

    async def response(self, request: Request) -> Response:
        headers = {"etag": self.etag, "cache-control": "no-cache"}
        cached = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in cached:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def load_page_assets() -> dict[str, StaticAsset]:
    """Load all files by URL path: `/`, `/static/*` of this page, `/static/web/*` shared with other pages."""
    static = files("vz_ray.serve").joinpath("static")
    assets = {"/": StaticAsset.load(static.joinpath("index.html"))}
    for prefix, folder in (("/static", static), ("/static/web", files("vz_ray.web"))):
        for entry in folder.iterdir():
            if PurePath(entry.name).suffix in CONTENT_TYPES and entry.name != "index.html":
                assets[f"{prefix}/{entry.name}"] = StaticAsset.load(entry)
    return assets


def page_router() -> APIRouter:
    """Return the routes of the web page."""
    router = APIRouter()
    for path, asset in load_page_assets().items():
        router.add_api_route(path, asset.response, methods=["GET", "HEAD"])
    return router
