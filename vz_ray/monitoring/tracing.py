"""Export of traces by OTLP/HTTP. A trace is a complete tree of spans, built after the fact.

    export(tree) -> bounded queue -> one thread: OpenTelemetry spans -> collector
                    full: dropped and counted

OpenTelemetry (extra `otel`) is imported only if traces are configured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vz_ray.monitoring.background_sink import BackgroundSink
from vz_ray.utils.errors import UserError

MAX_PENDING_TRACES = 512
"""Maximum number of traces in the queue."""
EXPORT_TIMEOUT_S = 10.0
"""Timeout of one request to the collector."""
CLOSE_TIMEOUT_S = 5.0
"""Maximum time for pending traces at the end of a run."""

SpanAttributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """Time interval with attributes and child spans. Times are seconds since the epoch."""

    name: str
    start_s: float
    end_s: float
    attributes: SpanAttributes = field(default_factory=dict)
    children: tuple[TraceSpan, ...] = ()
    error: str = ""


def is_sampled(key: str, sample_ratio: float) -> bool:
    """Return whether `key` belongs to the sampled share of all keys; deterministic."""
    hashed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return hashed < sample_ratio * 2**56


class TraceExporter:
    """Sends traces to an OTLP collector from a background thread.

    Args:
        endpoint: Base address of the collector; `/v1/traces` is appended.
        sample_ratio: Share of keys for which `should_trace` returns True.
        resource_attributes: Attributes of the process, shared by all traces.

    Raises:
        UserError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, sample_ratio: float, resource_attributes: SpanAttributes) -> None:
        self._sample_ratio = sample_ratio
        self._exporter, self._tracer, self._finished_spans = _open_exporter(endpoint, resource_attributes)
        self._sink = BackgroundSink[TraceSpan]("the trace collector", self._send, MAX_PENDING_TRACES)

    @property
    def dropped(self) -> int:
        """Number of dropped traces."""
        return self._sink.dropped

    def should_trace(self, key: str) -> bool:
        """Return whether the item with this id is traced."""
        return is_sampled(key, self._sample_ratio)

    def export(self, root: TraceSpan) -> None:
        """Enqueue a complete trace. Never blocks."""
        self._sink.put(root)

    def close(self) -> None:
        """Send pending traces for at most `CLOSE_TIMEOUT_S`, then close the exporter."""
        self._sink.close(CLOSE_TIMEOUT_S)
        self._exporter.shutdown()

    def _send(self, root: TraceSpan) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self._build(root, None)
        spans, self._finished_spans[:] = list(self._finished_spans), []
        if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            raise ConnectionError("the collector rejected them or did not answer; see logs/engines.log")

    def _build(self, span: TraceSpan, parent: Any) -> None:
        """Create the OpenTelemetry spans of a tree; they end up in `_finished_spans`."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        context = Context() if parent is None else set_span_in_context(parent, Context())
        otel_span = self._tracer.start_span(
            span.name, context, attributes=dict(span.attributes), start_time=_to_ns(span.start_s)
        )
        for child in span.children:
            self._build(child, otel_span)
        if span.error:
            otel_span.set_status(Status(StatusCode.ERROR, span.error))
        otel_span.end(_to_ns(max(span.start_s, span.end_s)))


def _to_ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _open_exporter(endpoint: str, resource_attributes: SpanAttributes) -> tuple[Any, Any, list[Any]]:
    """Return an exporter, a tracer, and the list that collects the tracer's finished spans."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    except ImportError as error:
        raise UserError(
            f"monitoring.otlp_endpoint is {endpoint!r}, but {error.name} is not installed; "
            "pip install 'vz_ray[otel]', or leave the key empty"
        ) from error
    finished_spans: list[Any] = []

    class Collect(SpanProcessor):
        def on_end(self, span: Any) -> None:
            finished_spans.append(span)

    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    provider = TracerProvider(resource=Resource.create(dict(resource_attributes)), shutdown_on_exit=False)
    provider.add_span_processor(Collect())
    return exporter, provider.get_tracer("vz_ray"), finished_spans
