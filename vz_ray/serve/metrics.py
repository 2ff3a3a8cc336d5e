"""What Prometheus reads at `/metrics`: one ingress's requests, and what its agents did for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vz_ray.serve.agent_protocol import AgentEvent, RequestCompleted, TextDelta, ZoomFinished

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


@dataclass(slots=True)
class RequestTimer:
    """One request under way: what it has come to, and when.

    Attributes:
        outcome: As of the trajectory, or `refused`, `shed`, `error`, or `left`: nobody waited for the end.
    """

    started: float = field(default_factory=time.monotonic)
    outcome: str = "left"
    first_token_s: float | None = None
    first_zoom_s: float | None = None

    def observe_event(self, event: AgentEvent) -> None:
        """Notes the first of each kind; only streamed events tell when that was."""
        since = time.monotonic() - self.started
        if isinstance(event, TextDelta) and self.first_token_s is None:
            self.first_token_s = since
        if isinstance(event, ZoomFinished) and self.first_zoom_s is None and event.frames:
            self.first_zoom_s = since


class ServeMetrics:
    """Counts of one ingress process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at = self.registry
        self._requests = Counter(
            "vz_ray_requests", "Chat requests, by how they ended", ["outcome"], registry=at
        )
        self._playing = Gauge("vz_ray_requests_in_progress", "Chat requests under way", registry=at)
        self._seconds = Histogram(
            "vz_ray_request_duration_seconds", "Whole requests", buckets=_SECONDS, registry=at
        )
        self._first = Histogram(
            "vz_ray_time_to_first_token_seconds",
            "Until the first text of a stream",
            buckets=_SECONDS,
            registry=at,
        )
        self._zoom = Histogram(
            "vz_ray_time_to_first_zoom_seconds",
            "Until the first clip of a stream",
            buckets=_SECONDS,
            registry=at,
        )
        self._tokens = Counter("vz_ray_tokens", "Tokens read and said", ["kind"], registry=at)
        self._frames = Counter("vz_ray_frames", "Frames shown to the model", registry=at)
        self._zooms = Counter("vz_ray_zooms", "Zooms carried out", registry=at)
        self._gated = Counter(
            "vz_ray_zoom_gate_skips", "Answers that the zoom gate gave at once", registry=at
        )
        self.weight_version = Gauge("vz_ray_weight_version", "Weights that answered last", registry=at)

    @contextmanager
    def track_request(self) -> Iterator[RequestTimer]:
        """A chat request, from its body to the end of its reply."""
        course = RequestTimer()
        self._playing.inc()
        try:
            yield course
        finally:
            self._playing.dec()
            self._requests.labels(course.outcome).inc()
            self._seconds.observe(time.monotonic() - course.started)
            if course.first_token_s is not None:
                self._first.observe(course.first_token_s)
            if course.first_zoom_s is not None:
                self._zoom.observe(course.first_zoom_s)

    def record_completion(self, end: RequestCompleted) -> None:
        """Adds what an answer took."""
        self._tokens.labels("read").inc(end.prompt_tokens)
        self._tokens.labels("said").inc(end.completion_tokens)
        self._frames.inc(end.frames)
        self._zooms.inc(end.zooms)
        self._gated.inc(end.gated)
        self.weight_version.set(end.version)

    def render(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
