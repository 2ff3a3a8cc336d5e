"""Prometheus metrics of one ingress process, served at `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vz_ray.serve.agent_protocol import AgentEvent, RequestCompleted, TextDelta, ZoomFinished

_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


@dataclass(slots=True)
class RequestTimer:
    """Outcome and latencies of one running request.

    Attributes:
        started: Start time on the monotonic clock, seconds.
        outcome: Status of the trajectory, or `invalid`, `overloaded`, `error`, or `cancelled` (the client
            disconnected; the default).
        first_token_s: Latency of the first text.
        first_zoom_s: Latency of the first clip.
    """

    started: float = field(default_factory=time.monotonic)
    outcome: str = "cancelled"
    first_token_s: float | None = None
    first_zoom_s: float | None = None

    def observe_event(self, event: AgentEvent) -> None:
        """Record the latency of the first text and of the first clip. Call it for streamed events only."""
        elapsed_s = time.monotonic() - self.started
        if isinstance(event, TextDelta) and self.first_token_s is None:
            self.first_token_s = elapsed_s
        if isinstance(event, ZoomFinished) and self.first_zoom_s is None and event.frames:
            self.first_zoom_s = elapsed_s


class ServeMetrics:
    """Counters and histograms in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter("vz_ray_requests", "Chat requests by outcome", ["outcome"], registry=registry)
        self._in_progress = Gauge("vz_ray_requests_in_progress", "Running chat requests", registry=registry)
        self._duration = Histogram(
            "vz_ray_request_duration_seconds", "Duration of requests", buckets=_BUCKETS, registry=registry
        )
        self._first_token = Histogram(
            "vz_ray_time_to_first_token_seconds",
            "Latency of the first text of a stream",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._first_zoom = Histogram(
            "vz_ray_time_to_first_zoom_seconds",
            "Latency of the first clip of a stream",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter("vz_ray_tokens", "Prompt and completion tokens", ["kind"], registry=registry)
        self._frames = Counter("vz_ray_frames", "Frames in the model's context", registry=registry)
        self._zooms = Counter("vz_ray_zooms", "Executed zooms", registry=registry)
        self._gate_skips = Counter(
            "vz_ray_zoom_gate_skips", "Answers without a zoom because of the zoom gate", registry=registry
        )
        self.weight_version = Gauge("vz_ray_weight_version", "Weight version of the last answer", registry=registry)

    @contextmanager
    def track_request(self) -> Iterator[RequestTimer]:
        """Measure one chat request, from the parsed body to the end of its response."""
        timer = RequestTimer()
        self._in_progress.inc()
        try:
            yield timer
        finally:
            self._in_progress.dec()
            self._requests.labels(timer.outcome).inc()
            self._duration.observe(time.monotonic() - timer.started)
            if timer.first_token_s is not None:
                self._first_token.observe(timer.first_token_s)
            if timer.first_zoom_s is not None:
                self._first_zoom.observe(timer.first_zoom_s)

    def record_completion(self, result: RequestCompleted) -> None:
        """Add the counts of one answer."""
        self._tokens.labels("prompt").inc(result.prompt_tokens)
        self._tokens.labels("completion").inc(result.completion_tokens)
        self._frames.inc(result.frames)
        self._zooms.inc(result.zooms)
        self._gate_skips.inc(result.gated)
        self.weight_version.set(result.version)

    def render(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)
