"""Errors of the job client: no response, another service, wrong Ray version, missing or wrong token."""

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

Responder = Callable[[BaseHTTPRequestHandler], tuple[int, str]]


@contextmanager
def http_server(respond: Responder) -> Iterator[str]:
    """HTTP server that responds to each GET with the result of `respond`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = respond(self)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def version_response(number: str) -> Responder:
    return lambda _: (200, json.dumps({"version": "4", "ray_version": number, "ray_commit": "x"}))


def test_address_defaults_to_ray_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_address("http://head:8265/") == "http://head:8265"
    with pytest.raises(UserError, match="no cluster address; give --address http://HEAD:8265"):
        resolve_address("")
    monkeypatch.setenv("RAY_ADDRESS", "http://from-ray:8265")
    assert resolve_address("") == "http://from-ray:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://api:443")
    assert resolve_address("") == "https://api:443"
    with pytest.raises(UserError, match="'ray://head:10001' is not a job API address"):
        resolve_address("ray://head:10001")


def test_unreachable_address_fails_at_once() -> None:
    with pytest.raises(UserError, match=r"no job API responds at http://127.0.0.1:9 .*kubectl port-forward"):
        JobClient("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("status", "message"), [(401, "a token is required, but no token is set"), (403, "the token is wrong")]
)
def test_missing_and_wrong_tokens_have_different_errors(status: int, message: str) -> None:
    with http_server(lambda _: (status, "no")) as address, pytest.raises(UserError, match=message):
        JobClient(address)


def test_token_mode_without_token_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "from vz_ray.jobs.job_client import JobClient; from vz_ray.utils.errors import UserError\n"
        "try: JobClient('http://127.0.0.1:9')\nexcept UserError as error: print(error)"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.startswith("RAY_AUTH_MODE is 'token', but no token is set; set RAY_AUTH_TOKEN or")


def test_other_ray_version_is_refused_unless_allowed() -> None:
    with http_server(version_response("2.41.0")) as address:
        with pytest.raises(UserError, match=f"runs Ray 2.41.0; vz_ray requires {ray.__version__}. Use an"):
            JobClient(address)
        assert JobClient(address, allow_version_mismatch=True).ray_version == "2.41.0"


def test_other_http_service_is_refused() -> None:
    with (
        http_server(lambda _: (200, "<html>hello</html>")) as address,
        pytest.raises(UserError, match="it is not Ray's job API"),
    ):
        JobClient(address)


def test_extra_headers_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[str | None] = []

    def respond(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        received.append(request.headers.get("x-team"))
        return version_response(ray.__version__)(request)

    monkeypatch.setenv("RAY_JOB_HEADERS", '{"x-team": "video"}')
    with http_server(respond) as address:
        JobClient(address)
    assert set(received) == {"video"}
    monkeypatch.setenv("RAY_JOB_HEADERS", "x-team: video")
    with pytest.raises(UserError, match="RAY_JOB_HEADERS is 'x-team: video'; it must be a JSON object"):
        JobClient("http://127.0.0.1:9")
