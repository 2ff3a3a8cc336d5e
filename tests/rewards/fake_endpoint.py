"""Local HTTP server with a scripted OpenAI chat completion endpoint."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class FakeReply:
    """Scripted reply: a completion with `text`, or a raw `body`."""

    text: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay_s: float = 0.0
    trickle_s: float = 0.0
    """Pause between single bytes of the body."""
    hang_up: bool = False


ReplyScript = Callable[[int, dict[str, Any]], FakeReply]
"""Maps the index and the body of a request to a reply."""


class FakeEndpoint:
    """Record of the requests.

    Attributes:
        requests: Bodies, in order.
        keys: Authorization headers, in order.
        max_concurrent: Most requests at once.
    """

    def __init__(self, script: ReplyScript) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.request_times_s: list[float] = []
        self.open = self.max_concurrent = 0
        self.lock = threading.Lock()
        self.url = ""

    def enter(self, body: dict[str, Any], key: str) -> int:
        with self.lock:
            self.requests.append(body)
            self.keys.append(key)
            self.request_times_s.append(time.monotonic())
            self.open += 1
            self.max_concurrent = max(self.max_concurrent, self.open)
            return len(self.requests) - 1

    def leave(self) -> None:
        with self.lock:
            self.open -= 1


def completion(text: str | None) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps(
        {"id": "c", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
    ).encode()


def _handler(endpoint: FakeEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            number = endpoint.enter(body, self.headers.get("authorization", ""))
            try:
                assert self.path == "/v1/chat/completions", self.path
                self.answer(endpoint.script(number, body))
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client closed the connection
            finally:
                endpoint.leave()

        def answer(self, reply: FakeReply) -> None:
            time.sleep(reply.delay_s)
            if reply.hang_up:
                self.close_connection = True
                self.connection.close()
                return
            data = completion(reply.text) if reply.body is None else reply.body
            self.send_response(reply.status)
            for name, value in {"content-type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            for i in range(len(data)) if reply.trickle_s else ():
                self.wfile.write(data[i : i + 1])
                self.wfile.flush()
                time.sleep(reply.trickle_s)
            self.wfile.write(data if not reply.trickle_s else b"")

        def log_message(self, format: str, *args: object) -> None:
            return

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serve_endpoint(script: ReplyScript) -> Iterator[FakeEndpoint]:
    """Serve an endpoint at `endpoint.url` until the block exits."""
    endpoint = FakeEndpoint(script)
    server = _Server(("127.0.0.1", 0), _handler(endpoint))
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
