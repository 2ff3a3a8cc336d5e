"""The episode browser's HTTP part: routes, static files, and the server itself."""

from __future__ import annotations

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

from vz_ray.report.viewer.access_control import AccessControl, is_loopback
from vz_ray.report.viewer.episode_row import EpisodeParseError
from vz_ray.report.viewer.index_queries import MAX_ROWS, EpisodeFilter
from vz_ray.report.viewer.viewer_session import EpisodeNotFound, ViewerSession
from vz_ray.utils.errors import UserError
from vz_ray.video.errors import VideoError

DEFAULT_PORT = 8765
MAX_SAFE_INTEGER = 2**53 - 1
"""Of the whole numbers that a browser knows exactly."""

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
STATIC = {"/static": "vz_ray.report.viewer.static", "/web": "vz_ray.web"}

IndexQuery = Annotated[int, Query(ge=0, le=MAX_SAFE_INTEGER)]
SortKey = Literal["newest", "step", "reward", "advantage", "zooms", "frames", "seconds"]


FloatQuery = Annotated[float | None, Query(allow_inf_nan=False)]
IntegerQuery = Annotated[int | None, Query(ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)]


def parse_filter(
    stage: str = "",
    step_from: IntegerQuery = None,
    step_to: IntegerQuery = None,
    reward_from: FloatQuery = None,
    reward_to: FloatQuery = None,
    kind: str = "",
    zooms: IntegerQuery = None,
    outcome: str = "",
    text: Annotated[str, Query(max_length=200)] = "",
) -> EpisodeFilter:
    """The filter that a request's query asks for."""
    return EpisodeFilter(stage, step_from, step_to, reward_from, reward_to, kind, zooms, outcome, text)


FilterQuery = Annotated[EpisodeFilter, Depends(parse_filter)]


def create_viewer_app(session: ViewerSession, *, host: str = "127.0.0.1", key: str = "") -> FastAPI:
    """The application; `host` and `key` as in `AccessControl`."""
    app = FastAPI(title="vz_ray view", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(AccessControl, host=host, key=key)
    for kind, status in ((EpisodeNotFound, 404), (VideoError, 404), (EpisodeParseError, 422)):
        app.add_exception_handler(kind, _says(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_pages(app)
    _add_lists(app, session)
    _add_episodes(app, session)
    return app


def _says(status: int) -> Any:
    async def handler(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status)

    return handler


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)


def _add_pages(app: FastAPI) -> None:
    """Every file of the front end at its own address: a request's path is looked up, never opened."""
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
    """As JSON; a number that is not finite, which JSON has no word for, is said so."""
    try:
        return JSONResponse(value)
    except ValueError as error:
        raise EpisodeParseError(
            "the episode holds a number that is not finite, so it cannot be shown"
        ) from error


def _add_lists(app: FastAPI, session: ViewerSession) -> None:
    @app.get("/api/state")
    def state() -> Response:
        return _json(session.state())

    @app.get("/api/problems")
    def problems() -> Response:
        return _json(session.skipped_lines())

    @app.get("/api/choices")
    def choices() -> Response:
        return _json(session.filter_options())

    @app.get("/api/charts")
    def charts(where: FilterQuery) -> Response:
        return _json(session.charts(where))

    @app.get("/api/episodes")
    def episodes(
        where: FilterQuery,
        sort: SortKey = "newest",
        up: bool = False,
        offset: IndexQuery = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 60,
    ) -> Response:
        return _json(session.page(where, sort, up, offset, limit))

    @app.get("/api/episode/{number}/neighbours")
    def neighbours(number: int, where: FilterQuery, sort: SortKey = "newest", up: bool = False) -> Response:
        return _json(session.neighbours(where, sort, up, _known(number)))


def _add_episodes(app: FastAPI, session: ViewerSession) -> None:
    @app.get("/api/episode/{number}")
    def episode(number: int) -> Response:
        return _json(session.episode(_known(number)))

    @app.get("/api/episode/{number}/group")
    def group(number: int) -> Response:
        return _json(session.group(_known(number)))

    @app.get("/api/episode/{number}/frames/{turn}")
    async def frames(number: int, turn: int) -> Response:
        if turn < 0:
            raise EpisodeNotFound(f"turns are numbered from 1; {turn} is none")
        return _json(await session.frame_server.thumbnail_strip(session.context(_known(number), turn)))

    @app.get("/api/video/{video}")
    async def facts(video: int) -> Response:
        return _json(await session.frame_server.video_info(session.video_uri(_known(video))))

    @app.api_route("/video/{video}", methods=["GET", "HEAD"])
    def file(video: int) -> Response:
        path, kind = session.frame_server.video_file(session.video_uri(_known(video)))
        return FileResponse(path, media_type=kind, content_disposition_type="inline")


def _known(number: int) -> int:
    if not 0 < number <= MAX_SAFE_INTEGER:
        raise EpisodeNotFound(f"nothing has the number {number}")
    return number


def _listen(host: str, port: int | None) -> socket.socket:
    """A bound socket; without a port, `DEFAULT_PORT` or any other where that is taken."""
    wanted = [DEFAULT_PORT, 0] if port is None else [port]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for one in wanted:
        try:
            return socket.create_server((host, one), family=family, backlog=128)
        except OSError as error:
            why = error.strerror or error
    raise UserError(f"cannot listen on {host}, port {port}: {why}; give another --host or --port")


def serve_viewer(
    run: Path, *, host: str = "127.0.0.1", port: int | None = None, open_page: bool = False
) -> None:
    """Serves a run until Ctrl-C; prints the address.

    Args:
        run: The run directory.
        host: Address to bind to; elsewhere than on loopback a key is needed, which the address holds.
        port: 0 takes any free one; None takes `DEFAULT_PORT`, or any free one if that is taken.
        open_page: Whether to open the page in a browser.

    Raises:
        UserError: There is no such run, or the address cannot be bound.
    """
    session = ViewerSession(run)
    try:
        listener = _listen(host, port)
        key = "" if is_loopback(host) else secrets.token_urlsafe(16)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?key={key}" if key else "")
        session.follower.start()
        print(f"{run}: {address}\nCtrl-C ends it.", flush=True)
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
