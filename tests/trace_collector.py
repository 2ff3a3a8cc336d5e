"""OTLP/HTTP trace collector for tests."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class TraceCollector:
    """Requests and spans received so far; `delay_s` and `status` control the responses."""

    url: str = ""
    paths: list[str] = field(default_factory=list)
    spans: list = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)
    delay_s: float = 0.0
    status: int = 200


@contextmanager
def collect_traces() -> Iterator[TraceCollector]:
    """Run a collector inside the block."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service

    collector = TraceCollector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            time.sleep(collector.delay_s)
            request = service.ExportTraceServiceRequest.FromString(body)
            collector.paths.append(self.path)
            if collector.status == 200:
                for resource in request.resource_spans:
                    collector.resources.append({a.key: a.value.string_value for a in resource.resource.attributes})
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
            self.send_response(collector.status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield collector
    server.shutdown()
    server.server_close()
