"""Traces by OTLP/HTTP: trees of spans that are made whole, after what they tell of is over.

    add(tree) -> a bounded queue -> one thread: spans -> collector
                 full: dropped and counted

OpenTelemetry is imported only where traces are asked for (extra `otel`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vz_ray.monitoring.background_sink import BackgroundSink
from vz_ray.utils.errors import UserError

MAX_PENDING_TRACES = 512
"""Traces that may wait for the collector."""
EXPORT_TIMEOUT_S = 10.0
"""How long the collector may take for one."""
CLOSE_TIMEOUT_S = 5.0
"""How long the end of a run waits for what has not been sent."""

SpanAttributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """A stretch of time, and what happened in it. Times are seconds since the epoch."""

    name: str
    start_s: float
    end_s: float
    attributes: SpanAttributes = field(default_factory=dict)
    children: tuple[TraceSpan, ...] = ()
    error: str = ""


def is_sampled(key: str, sample_ratio: float) -> bool:
    """Whether `key` is among a share of all keys; always the same answer for the same key."""
    drawn = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return drawn < sample_ratio * 2**56


class TraceExporter:
    """Sends traces to a collector.

    Args:
        endpoint: Its base address; `/v1/traces` is added.
        share: Of the keys that are `should_trace`.
        about: Attributes of the process that all of its traces share.

    Raises:
        UserError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, sample_ratio: float, resource_attributes: SpanAttributes) -> None:
        self._share = sample_ratio
        self._exporter, self._tracer, self._made = _opened(endpoint, resource_attributes)
        self._behind = BackgroundSink[TraceSpan]("the trace collector", self._send, MAX_PENDING_TRACES)

    @property
    def dropped(self) -> int:
        """Traces that were given up."""
        return self._behind.dropped

    def should_trace(self, key: str) -> bool:
        """Whether what has this id is to be traced."""
        return is_sampled(key, self._share)

    def export(self, root: TraceSpan) -> None:
        """A whole trace; returns at once."""
        self._behind.put(root)

    def close(self) -> None:
        """Waits a few seconds for what has not been sent."""
        self._behind.close(CLOSE_TIMEOUT_S)
        self._exporter.shutdown()

    def _send(self, root: TraceSpan) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self._make(root, None)
        made, self._made[:] = list(self._made), []
        if self._exporter.export(made) is not SpanExportResult.SUCCESS:
            raise ConnectionError("it refused them or did not answer; see logs/engines.log")

    def _make(self, span: TraceSpan, parent: Any) -> None:
        """OpenTelemetry's own spans of a tree, into `_made`."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        context = Context() if parent is None else set_span_in_context(parent, Context())
        start = self._tracer.start_span(
            span.name, context, attributes=dict(span.attributes), start_time=_ns(span.start_s)
        )
        for child in span.children:
            self._make(child, start)
        if span.error:
            start.set_status(Status(StatusCode.ERROR, span.error))
        start.end(_ns(max(span.start_s, span.end_s)))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _opened(endpoint: str, about: SpanAttributes) -> tuple[Any, Any, list[Any]]:
    """An exporter, a tracer, and the list that spans of this tracer end in."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    except ImportError as error:
        raise UserError(
            f"observe.otlp_endpoint is {endpoint!r} and {error.name} is not installed: pip install "
            "'vz_ray[otel]', or leave it empty"
        ) from error
    made: list[Any] = []

    class Keep(SpanProcessor):
        def on_end(self, span: Any) -> None:
            made.append(span)

    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    provider = TracerProvider(resource=Resource.create(dict(about)), shutdown_on_exit=False)
    provider.add_span_processor(Keep())
    return exporter, provider.get_tracer("vz_ray"), made
