"""HTTP server of the episode viewer: routes and static files."""

from __future__ import annotations

import asyncio
import secrets
import socket
import webbrowser
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response

from vz_ray.report.viewer.access_control import ViewerAccessControl, is_loopback
from vz_ray.report.viewer.episode_row import EpisodeParseError
from vz_ray.report.viewer.index_queries import MAX_ROWS, MAX_SAFE_INTEGER, EpisodeFilter
from vz_ray.report.viewer.viewer_session import EpisodeNotFound, ViewerSession
from vz_ray.utils.errors import UserError
from vz_ray.video.errors import VideoError

DEFAULT_PORT = 8765
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
STATIC = {"/static": "vz_ray.report.viewer.static", "/web": "vz_ray.web"}

IndexQuery = Annotated[int, Query(ge=0, le=MAX_SAFE_INTEGER)]
SortKey = Literal["newest", "step", "reward", "advantage", "zooms", "frames", "seconds"]
FilterQuery = Annotated[EpisodeFilter, Depends()]
"""Filter with one query parameter per field."""


def create_viewer_app(session: ViewerSession, *, host: str = "127.0.0.1", key: str = "") -> FastAPI:
    """Create the application; `host` and `key` as in `ViewerAccessControl`."""
    app = FastAPI(title="vz_ray view", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(ViewerAccessControl, host=host, key=key)
    for kind, status in ((EpisodeNotFound, 404), (VideoError, 404), (EpisodeParseError, 422)):
        app.add_exception_handler(kind, _error_handler(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_pages(app)
    _add_lists(app, session)
    _add_episodes(app, session)
    return app


def _error_handler(status: int) -> Any:
    async def handler(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status)

    return handler


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)


def _add_pages(app: FastAPI) -> None:
    """Add one route per front-end file. The request path is never used as a file path."""
    for prefix, package in STATIC.items():
        for entry in files(package).iterdir():
            kind = MEDIA_TYPES.get(Path(entry.name).suffix)
            if kind is not None:
                content = entry.read_bytes()
                app.add_api_route(f"{prefix}/{entry.name}", _page(content, kind), methods=["GET", "HEAD"])
                if entry.name == "index.html":
                    app.add_api_route("/", _page(content, kind), methods=["GET", "HEAD"])


def _page(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return page


def _json(value: Any) -> Response:
    """Encode as JSON; raise `EpisodeParseError` for non-finite numbers."""
    try:
        return JSONResponse(value)
    except ValueError as error:
        raise EpisodeParseError("the episode has a non-finite number and cannot be displayed") from error


def _add_lists(app: FastAPI, session: ViewerSession) -> None:
    @app.get("/api/state")
    def state() -> Response:
        return _json(session.state())

    @app.get("/api/skipped_lines")
    def skipped_lines() -> Response:
        return _json(session.skipped_lines())

    @app.get("/api/filter_options")
    def filter_options() -> Response:
        return _json(session.filter_options())

    @app.get("/api/charts")
    def charts(episode_filter: FilterQuery) -> Response:
        return _json(session.charts(episode_filter))

    @app.get("/api/episodes")
    def episodes(
        episode_filter: FilterQuery,
        sort: SortKey = "newest",
        ascending: bool = False,
        offset: IndexQuery = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 60,
    ) -> Response:
        return _json(session.page(episode_filter, sort, ascending, offset, limit))

    @app.get("/api/episode/{number}/neighbours")
    def neighbours(
        number: int, episode_filter: FilterQuery, sort: SortKey = "newest", ascending: bool = False
    ) -> Response:
        return _json(session.neighbours(episode_filter, sort, ascending, _valid_id(number)))


def _add_episodes(app: FastAPI, session: ViewerSession) -> None:
    @app.get("/api/episode/{number}")
    def episode(number: int) -> Response:
        return _json(session.episode(_valid_id(number)))

    @app.get("/api/episode/{number}/group")
    def group(number: int) -> Response:
        return _json(session.group(_valid_id(number)))

    @app.get("/api/episode/{number}/frames/{turn}")
    async def frames(number: int, turn: int) -> Response:
        if turn < 0:
            raise EpisodeNotFound(f"turn is {turn}; turns are numbered from 1")
        context = await asyncio.to_thread(session.context, _valid_id(number), turn)
        return _json(await session.frame_server.thumbnail_strip(context))

    @app.get("/api/video/{video}")
    async def facts(video: int) -> Response:
        uri = await asyncio.to_thread(session.video_uri, _valid_id(video))
        return _json(await session.frame_server.video_info(uri))

    @app.api_route("/video/{video}", methods=["GET", "HEAD"])
    def file(video: int) -> Response:
        path, kind = session.frame_server.video_file(session.video_uri(_valid_id(video)))
        return FileResponse(path, media_type=kind, content_disposition_type="inline")


def _valid_id(number: int) -> int:
    if not 0 < number <= MAX_SAFE_INTEGER:
        raise EpisodeNotFound(f"no item has the id {number}")
    return number


def _listen(host: str, port: int | None) -> socket.socket:
    """Return a bound socket; without a port, use `DEFAULT_PORT` or, if it is in use, any free port."""
    candidates = [DEFAULT_PORT, 0] if port is None else [port]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in candidates:
        try:
            return socket.create_server((host, candidate), family=family, backlog=128)
        except OSError as error:
            reason = error.strerror or error
    raise UserError(f"cannot listen on {host}, port {port}: {reason}; give another --host or --port")


def serve_viewer(run: Path, *, host: str = "127.0.0.1", port: int | None = None, open_page: bool = False) -> None:
    """Serve a run until Ctrl-C; print the address.

    Args:
        run: Run directory.
        host: Address to bind to. Except on loopback, the printed address contains an access key.
        port: 0 uses any free port; None uses `DEFAULT_PORT`, or any free port if it is in use.
        open_page: Open the page in a browser.

    Raises:
        UserError: The run does not exist, or the address cannot be bound.
    """
    session = ViewerSession(run)
    try:
        listener = _listen(host, port)
        key = "" if is_loopback(host) else secrets.token_urlsafe(16)
        url_host = f"[{host}]" if ":" in host else host
        address = f"http://{url_host}:{listener.getsockname()[1]}/" + (f"?key={key}" if key else "")
        session.follower.start()
        print(f"{run}: {address}\nPress Ctrl-C to stop.", flush=True)
        if open_page:
            webbrowser.open(address)
        config = uvicorn.Config(
            create_viewer_app(session, host=host, key=key),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        session.close()
