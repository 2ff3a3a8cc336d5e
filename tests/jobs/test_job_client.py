"""What is said where a cluster does not answer, answers otherwise, or wants a token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from vz_ray.jobs.job_client import JobClient, resolve_address
from vz_ray.utils.errors import UserError

Answer = Callable[[BaseHTTPRequestHandler], tuple[int, str]]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """A real HTTP server that answers every GET as `answer` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            return

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        made.server_close()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def version(number: str) -> Answer:
    return lambda _: (200, json.dumps({"version": "4", "ray_version": number, "ray_commit": "x"}))


def test_the_address_is_given_or_rays_own_variables_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_address("http://head:8265/") == "http://head:8265"
    with pytest.raises(UserError, match=r"which cluster\? give --address http://HEAD:8265"):
        resolve_address("")
    monkeypatch.setenv("RAY_ADDRESS", "http://from-ray:8265")
    assert resolve_address("") == "http://from-ray:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://api:443")
    assert resolve_address("") == "https://api:443"
    with pytest.raises(UserError, match="'ray://head:10001' is not that of a job API"):
        resolve_address("ray://head:10001")


def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"no job API answers at http://127.0.0.1:9 .*kubectl port-forward"):
        JobClient("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("status", "said"), [(401, "it wants a token, and none was found"), (403, "the token is wrong")]
)
def test_a_token_that_is_missing_or_wrong_is_told_apart(status: int, said: str) -> None:
    with server(lambda _: (status, "no")) as address, pytest.raises(UserError, match=said):
        JobClient(address)


def test_a_token_that_was_promised_and_is_not_there_is_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "from vz_ray.jobs.job_client import JobClient; from vz_ray.utils.errors import UserError\n"
        "try: JobClient('http://127.0.0.1:9')\nexcept UserError as error: print(error)"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("RAY_AUTH_MODE is 'token', and none was found; set RAY_AUTH_TOKEN or")


def test_another_ray_is_refused_unless_one_insists() -> None:
    with server(version("2.41.0")) as address:
        with pytest.raises(
            UserError, match=f"runs Ray 2.41.0, and this is written for {ray.__version__}: use an"
        ):
            JobClient(address)
        assert JobClient(address, allow_version_mismatch=True).ray_version == "2.41.0"


def test_whatever_else_answers_there_is_no_ray() -> None:
    with (
        server(lambda _: (200, "<html>hello</html>")) as address,
        pytest.raises(UserError, match="not as Ray's job"),
    ):
        JobClient(address)


def test_headers_for_a_proxy_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        seen.append(request.headers.get("x-team"))
        return version(ray.__version__)(request)

    monkeypatch.setenv("RAY_JOB_HEADERS", '{"x-team": "video"}')
    with server(answer) as address:
        JobClient(address)
    assert set(seen) == {"video"}
    monkeypatch.setenv("RAY_JOB_HEADERS", "x-team: video")
    with pytest.raises(UserError, match="RAY_JOB_HEADERS is 'x-team: video'; it must be a JSON object"):
        JobClient("http://127.0.0.1:9")
