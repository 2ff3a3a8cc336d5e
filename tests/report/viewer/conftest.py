"""Fixtures: a run with real videos, and its viewer on a free port."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from tests.report.viewer.run_factory import make_run, make_videos
from vz_ray.report.viewer.server import create_viewer_app
from vz_ray.report.viewer.viewer_session import ViewerSession


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run with twelve groups of four samples over six steps, and an evaluation of six questions."""
    root = tmp_path_factory.mktemp("browser")
    return make_run(root / "needles", make_videos(root))


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    """Writable copy of the run; the videos are shared."""
    return Path(shutil.copytree(made_run, tmp_path / "run" / made_run.name))


Open = Callable[[Path], ViewerSession]


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[Open]:
    """Open runs with an index in `tmp_path`, caught up once; close them after the test."""
    with contextlib.ExitStack() as stack:

        def make(run: Path) -> ViewerSession:
            session = ViewerSession(run, tmp_path / "index" / f"{run.name}.sqlite")
            stack.callback(session.close)
            session.follower.catch_up()
            return session

        yield make


@contextlib.contextmanager
def served(session: ViewerSession) -> Iterator[str]:
    """Serve a session with its log follower; yield the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_viewer_app(session), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    session.follower.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        session.close()
