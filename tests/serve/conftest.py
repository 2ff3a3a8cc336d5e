"""HTTP server with access control and the Files API only: uvicorn on loopback, in a thread."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.serve import AccessConfig, UploadsConfig
from vz_ray.serve.access_control import install_access_control, owner_id
from vz_ray.serve.api_errors import overloaded
from vz_ray.serve.api_keys import ApiKeyStore, add_key, generate_key
from vz_ray.serve.file_store import FileStore
from vz_ray.serve.files_api import files_router
from vz_ray.serve.media_resolver import MediaResolver
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import SourceNotAllowedError
from vz_ray.video.frame import FrameSize, ImageRequest, VideoInfo
from vz_ray.video.remote import DownloadRules

if TYPE_CHECKING:
    from tests.serve.live_server import LiveServer


class AskBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    video: str = ""
    image: str = ""
    count: Annotated[int, Field(ge=1)] = 1


@dataclass
class GuardedServer:
    """A running server.

    Attributes:
        port: Port on loopback.
        directory: Directory of uploads.
        keys: Keys file.
        secret: API key of the clients; empty without keys.
        hold: Event that ends the requests to /v1/hold.
        busy: Owner ids of started requests to /v1/hold.
        seen: Resolved media of /v1/ask, each with True if the file existed.
    """

    port: int
    directory: Path
    keys: Path
    secret: str
    hold: threading.Event = field(default_factory=threading.Event)
    busy: list[str] = field(default_factory=list)
    seen: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, secret: str | None = None, **more: Any) -> httpx.Client:
        key = self.secret if secret is None else secret
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False, **more)

    def stored_files(self) -> list[str]:
        """Return the file names in the directory of uploads."""
        return sorted(path.name for path in self.directory.iterdir())

    def send_raw(self, head: str, body: bytes = b"") -> socket.socket:
        """Open a connection and send `head` (request line and headers without Host) and `body`."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        key = f"Authorization: Bearer {self.secret}\r\n" if self.secret else ""
        lines = head.strip().replace("\n", "\r\n")
        connection.sendall(f"{lines}\r\nHost: 127.0.0.1:{self.port}\r\n{key}\r\n".encode() + body)
        return connection


def application(served: GuardedServer, store: FileStore, files: UploadsConfig) -> FastAPI:
    app = FastAPI()
    reader, rules = ClipReader(max_open_videos=1), DownloadRules(hosts=())

    async def probe(path: str) -> VideoInfo:
        return await asyncio.to_thread(reader.probe, path)

    async def look(path: str) -> object:
        return await asyncio.to_thread(reader.clip, path, ImageRequest(), FrameSize(25_088, 100_352, 28))

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ok": True}

    @app.get("/")
    async def page() -> dict[str, bool]:
        return {"page": True}

    @app.post("/v1/ask")
    async def ask(body: AskBody, request: Request) -> dict[str, Any]:
        async with MediaResolver(store, owner_id(request), rules, files.allowed_dirs) as media:
            for index, (url, kind) in enumerate(((body.video, "video"), (body.image, "image"))):
                if url:
                    source = await media.resolve(url, kind, f"content.{index}")
                    served.seen.append((source.uri, Path(source.uri).exists()))
        return {"count": body.count}

    @app.post("/v1/hold")
    async def hold(request: Request) -> dict[str, bool]:
        await request.body()
        served.busy.append(owner_id(request))
        await asyncio.to_thread(served.hold.wait, 30)
        return {"ok": True}

    @app.get("/v1/fail")
    async def fail() -> None:
        raise RuntimeError(f"a secret of {store.directory}")

    @app.get("/v1/full")
    async def full() -> None:
        raise overloaded("All engines are busy.", 7.2, 503)

    @app.get("/v1/refused")
    async def refused() -> None:
        raise SourceNotAllowedError(f"{store.directory} is private")

    @app.get("/v1/midway")
    async def midway() -> StreamingResponse:
        async def lines() -> Any:
            yield b"data: 1\n\n"
            raise RuntimeError("a secret")

        return StreamingResponse(lines(), media_type="text/event-stream")

    app.include_router(files_router(store, probe, look))
    return app


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., GuardedServer]]:
    """Start servers: `serve(with_keys=False, max_json_mib=1)`, with options of `access` and `files`."""
    running: list[tuple[uvicorn.Server, threading.Thread, GuardedServer]] = []

    def start(*, with_keys: bool = True, file_bytes: int = 2**30, **options: Any) -> GuardedServer:
        upload_options = {
            name: options.pop(name) for name in ("max_gib", "ttl_days", "allowed_dirs") if name in options
        }
        files, access = UploadsConfig(**upload_options), AccessConfig(**options)
        store = FileStore(tmp_path / "uploads", int(files.max_gib * 2**30), files.ttl_days, file_bytes)
        secret, key = generate_key("alice")
        served = GuardedServer(0, store.directory, tmp_path / "keys" / "keys.json", secret if with_keys else "")
        if with_keys and not served.keys.exists():
            add_key(served.keys, key)
        app = application(served, store, files)
        install_access_control(app, access, ApiKeyStore(served.keys) if with_keys else None)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        served.port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread, served))
        return served

    yield start
    for server, _, served in running:
        served.hold.set()
        server.should_exit = server.force_exit = True
    for _, thread, _ in running:
        thread.join()


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video"), VideoSpec("video.mp4"))


def client_of_bob(served: GuardedServer) -> httpx.Client:
    """Add a second key and return a client with it."""
    secret, key = generate_key("bob")
    add_key(served.keys, key)
    return served.client(secret=secret)


def read_response(connection: socket.socket) -> tuple[int, str]:
    """Return the status and all further data until the server closes the connection."""
    received = b""
    with connection:
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), (head + b"\r\n\r\n" + body).decode()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response; it must have OpenAI's format and a request id."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Server without keys, with limits on bodies that are small enough for tests."""
    from tests.serve.live_server import live_server, tiny_serve_config

    folder = tmp_path_factory.mktemp("serve")
    limits = {"max_json_mib": 16, "max_upload_gib": 0.02, "grace_s": 3, "min_kib_per_s": 50}
    config = tiny_serve_config(folder, **{f"access.{name}": value for name, value in limits.items()})
    with live_server(config, folder) as running:
        yield running
