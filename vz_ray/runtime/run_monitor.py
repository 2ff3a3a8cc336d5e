"""State and metrics of a run, reported by the training loop and the rollout scheduler.

All methods return quickly, never block and never raise: monitoring must not stop a run.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from vz_ray.env.trajectory import EpisodeStatus, Trajectory
from vz_ray.monitoring.live_status import LiveStatus, RunKind
from vz_ray.monitoring.metric_catalog import metrics_from_row
from vz_ray.monitoring.tracing import SpanAttributes, TraceExporter, TraceSpan
from vz_ray.monitoring.trackers import Tracker
from vz_ray.runtime.episode_span import episode_span
from vz_ray.video.frame import ZoomRequest

log = logging.getLogger(__name__)

PHASES = ("start", "rollout", "sleep", "learn", "publish", "evaluate", "checkpoint", "export")
"""Phases of a run."""
_LABELED_COUNTERS = (
    ("vz_episodes", "status", tuple(status.value for status in EpisodeStatus)),
    ("vz_zoom_calls", "outcome", ("valid", "rejected")),
    ("vz_groups", "outcome", ("kept", "dropped")),
)
"""Counters that are created at the start with every value of their label."""
_COUNTERS = ("vz_sampled_tokens", "vz_nonfinite_values")
_MAX_CLIP_WAITS = 512

F = TypeVar("F", bound=Callable[..., None])


class MetricRecorder(Protocol):
    """Records metrics of the catalog; see `RayMetrics`."""

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def add(self, name: str, amount: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


class NullMetricRecorder:
    """Discards all metrics."""

    def set(self, name: str, value: float, **labels: str) -> None:
        pass

    def add(self, name: str, amount: float, **labels: str) -> None:
        pass

    def observe(self, name: str, value: float, **labels: str) -> None:
        pass


def _never_raises(method: F) -> F:
    """Log exceptions of `method` instead of raising them."""

    @wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception:
            log.warning("Run monitor failed in %s; the run continues", method.__name__, exc_info=True)

    return guarded  # type: ignore[return-value]


class RunMonitor:
    """Collects the live status, metrics and traces of one run.

    Args:
        run: Name of the run.
        metrics: Metric recorder; None discards metrics.
        trace_exporter: Trace exporter; None disables traces.
        trackers: Experiment trackers, passed on to the metric logger.
        run_kind: Kind of the run.
        metrics_file: Name of the metrics file in the run directory.

    Attributes:
        status: Live status of the run.
        started_s: Start of the monitor, seconds since the epoch.
        accepted_episodes: Number of accepted episodes since the start of the monitor.
        max_mismatch_kl: Mismatch KL that stops training.
        clip_waits_s: Wait times of the most recent clips.
        step_gauges: Gauges of the last step: labels and value by name and label values.
    """

    def __init__(
        self,
        run: str = "",
        metrics: MetricRecorder | None = None,
        trace_exporter: TraceExporter | None = None,
        trackers: Sequence[Tracker] = (),
        *,
        run_kind: RunKind = RunKind.RL,
        metrics_file: str = "metrics.jsonl",
    ) -> None:
        self.metrics: MetricRecorder = metrics or NullMetricRecorder()
        self.trace_exporter, self.trackers = trace_exporter, trackers
        now = time.time()
        self.status = LiveStatus(
            run=run,
            phase_started_s=now,
            last_step_s=now,
            run_kind=run_kind.value,
            metrics_file=metrics_file,
        )
        self.max_mismatch_kl = math.inf
        self.started_s, self.accepted_episodes = now, 0
        self.clip_waits_s: deque[float] = deque(maxlen=_MAX_CLIP_WAITS)
        self.step_gauges: dict[tuple[str, str], tuple[dict[str, str], float]] = {}
        self._phase_spans: list[TraceSpan] = []
        self._in_step, self._phase_started = False, time.monotonic()
        self._loop_start: tuple[int, float] | None = None

    @_never_raises
    def on_start(self, step: int, max_steps: int, max_mismatch_kl: float = math.inf) -> None:
        """Record the start or resume of the loop after `step` of `max_steps` steps.

        Args:
            max_steps: 0 if unknown.
            max_mismatch_kl: Mismatch KL that stops training.
        """
        self.status.step, self.status.max_steps = step, max_steps
        self.max_mismatch_kl = max_mismatch_kl
        self.status.last_step_s = time.time()
        if self.status.run_kind == RunKind.RL:
            for name, label, values in _LABELED_COUNTERS:
                for value in values:
                    self.metrics.add(name, 0, **{label: value})
            for name in _COUNTERS:
                self.metrics.add(name, 0)
        self._loop_start = (step, time.monotonic())
        self._phase_spans, self._in_step = [], False

    @_never_raises
    def on_phase(self, phase: str) -> None:
        """Record the start of a phase, one of `PHASES`."""
        now = time.time()
        if self._in_step and self.trace_exporter:
            self._phase_spans.append(TraceSpan(self.status.phase, self.status.phase_started_s, now))
        self.status.phase, self.status.phase_started_s, self._in_step = phase, now, True
        self._phase_started = time.monotonic()

    @_never_raises
    def on_episode(self, trajectory: Trajectory) -> None:
        """Record an accepted and scored episode."""
        metrics = self.metrics
        self.accepted_episodes += 1
        metrics.add("vz_episodes", 1, status=trajectory.status.value)
        metrics.add("vz_sampled_tokens", sum(len(turn.action.token_ids) for turn in trajectory.turns))
        num_valid = len(trajectory.zooms)
        metrics.add("vz_zoom_calls", num_valid, outcome="valid")
        metrics.add("vz_zoom_calls", trajectory.num_zoom_calls - num_valid, outcome="rejected")
        metrics.observe("vz_episode_seconds", trajectory.seconds)
        overview_s = trajectory.seconds - sum(sum(turn.seconds) for turn in trajectory.turns)
        metrics.observe("vz_clip_wait_seconds", max(0.0, overview_s), kind="overview")
        for turn in trajectory.turns:
            metrics.observe("vz_generate_seconds", turn.seconds[0])
            if isinstance(turn.zoom, ZoomRequest):
                metrics.observe("vz_clip_wait_seconds", turn.seconds[1], kind="zoom")
                self.clip_waits_s.append(turn.seconds[1])
        if self.trace_exporter and self.trace_exporter.should_trace(str(trajectory.id)):
            self.trace_exporter.export(episode_span(trajectory, time.time(), self.status.run))

    @_never_raises
    def on_rl_step(self, step: int, row: Mapping[str, float], num_groups: int, num_kept: int) -> None:
        """Record the metrics row of a training step, and its sampled and kept groups."""
        self.metrics.add("vz_groups", num_kept, outcome="kept")
        self.metrics.add("vz_groups", num_groups - num_kept, outcome="dropped")
        self.metrics.add("vz_nonfinite_values", sum(not math.isfinite(value) for value in row.values()))
        self._update_progress(step + 1, row)

    @_never_raises
    def on_progress(self, done: int, row: Mapping[str, float] = MappingProxyType({})) -> None:
        """Record that `done` steps or episodes are complete; `row` has keys of `metrics.jsonl`."""
        self._update_progress(done, row)

    def _update_progress(self, done: int, row: Mapping[str, float]) -> None:
        for metric, labels, value in metrics_from_row(row):
            self.step_gauges[metric.name, "".join(labels.values())] = (labels, value)
        status, start = self.status, self._loop_start
        status.step, status.last_step_s = done, time.time()
        if start is not None and done > start[0] and status.max_steps:
            step_s = (time.monotonic() - start[1]) / (done - start[0])
            status.eta_s = step_s * max(0, status.max_steps - done)

    @_never_raises
    def on_checkpoint(self, step: int) -> None:
        """Record a checkpoint after `step` steps. Its duration is that of the current phase."""
        self.status.checkpoint = {
            "at_s": time.time(),
            "seconds": time.monotonic() - self._phase_started,
            "step": float(step),
        }

    @_never_raises
    def on_step_end(self, step: int) -> None:
        """Export the trace of a step after its checkpoint and evaluation."""
        now = time.time()
        phases = (*self._phase_spans, TraceSpan(self.status.phase, self.status.phase_started_s, now))
        self._phase_spans, self._in_step = [], False
        if self.trace_exporter:
            attributes: SpanAttributes = {"vz.run": self.status.run, "vz.step": step}
            self.trace_exporter.export(TraceSpan("step", phases[0].start_s, now, attributes, phases))

    def dropped_records(self) -> dict[str, int]:
        """Return the number of dropped traces and tracker rows by sink."""
        dropped = {tracker.name: tracker.dropped for tracker in self.trackers}
        return dropped | ({"otlp": self.trace_exporter.dropped} if self.trace_exporter else {})
