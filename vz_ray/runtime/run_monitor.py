"""What loops and the fleet tell: where the run is, and what its episodes were like.

Every method is quick, waits for nobody and raises nothing: a run must not end because of who looks on.
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
from vz_ray.monitoring.live_status import RL_RUN, LiveStatus
from vz_ray.monitoring.metric_catalog import metrics_from_row
from vz_ray.monitoring.tracing import SpanAttributes, TraceExporter, TraceSpan
from vz_ray.monitoring.trackers import Tracker
from vz_ray.runtime.episode_span import episode_span
from vz_ray.video.frame import ZoomRequest

log = logging.getLogger(__name__)

PHASES = ("start", "rollout", "learn", "publish", "evaluate", "checkpoint", "export")
"""What a run may be doing."""
_COUNTED = (
    ("vz_episodes", "status", tuple(status.value for status in EpisodeStatus)),
    ("vz_zoom_calls", "outcome", ("carried_out", "refused")),
    ("vz_groups", "outcome", ("kept", "dropped")),
)
"""Counters that are there from the start, with every value of their label."""
_RECENT = 512
"""Waits for clips that `vz-ray top` knows of."""

F = TypeVar("F", bound=Callable[..., None])


class MetricRecorder(Protocol):
    """Where metrics of the catalogue go; see `RayMetrics`."""

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def add(self, name: str, amount: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


class NullMetricRecorder:
    """Nobody reads them."""

    def set(self, name: str, value: float, **labels: str) -> None:
        pass

    def add(self, name: str, amount: float, **labels: str) -> None:
        pass

    def observe(self, name: str, value: float, **labels: str) -> None:
        pass


def _never_raises(method: F) -> F:
    """What goes wrong inside is logged, and forgotten."""

    @wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception:
            log.warning("the watch lost track; the run goes on", exc_info=True)

    return guarded  # type: ignore[return-value]


class RunMonitor:
    """One run as it tells of itself; without arguments it listens and tells nobody.

    Args:
        run: Name of the run.
        metrics: Where metrics go.
        trace_exporter: Where traces go; None makes none.
        trackers: Experiment trackers; the metrics log hands its rows on to them.
        unit: What the run counts: one of those of `monitoring.status`.
        rows: File of its metrics in the run directory.

    Attributes:
        status: Where the run is.
        accepted_episodes: Since the watch began.
        clip_waits_s: What the last clips were waited for.
        step_gauges: Gauges of the last iteration: name, labels and value.
    """

    def __init__(
        self,
        run: str = "",
        metrics: MetricRecorder | None = None,
        trace_exporter: TraceExporter | None = None,
        trackers: Sequence[Tracker] = (),
        *,
        run_kind: str = RL_RUN,
        metrics_file: str = "metrics.jsonl",
    ) -> None:
        self.metrics: MetricRecorder = metrics or NullMetricRecorder()
        self.trace_exporter, self.trackers = trace_exporter, trackers
        now = time.time()
        self.status = LiveStatus(
            run=run, phase_started_s=now, last_step_s=now, run_kind=run_kind, metrics_file=metrics_file
        )
        self.max_mismatch_kl = math.inf
        self.started_s, self.accepted_episodes = now, 0
        self.clip_waits_s: deque[float] = deque(maxlen=_RECENT)
        self.step_gauges: dict[tuple[str, str], tuple[dict[str, str], float]] = {}
        self._phases: list[TraceSpan] = []
        self._open, self._since = False, time.monotonic()
        self._first: tuple[int, float] | None = None

    @_never_raises
    def on_start(self, step: int, max_steps: int, max_mismatch_kl: float = math.inf) -> None:
        """The loop begins, or goes on, `step` of `max_steps` behind it.

        Args:
            max_steps: 0 where nobody knows.
            max_mismatch_kl: Mismatch of engine and learner at which reinforcement learning stops itself.
        """
        self.status.step, self.status.max_steps = step, max_steps
        self.max_mismatch_kl = max_mismatch_kl
        self.status.last_step_s = time.time()
        for name, label, values in _COUNTED if self.status.run_kind == RL_RUN else ():
            for value in values:
                self.metrics.add(name, 0, **{label: value})
        for name in ("vz_sampled_tokens", "vz_nonfinite_values") if self.status.run_kind == RL_RUN else ():
            self.metrics.add(name, 0)
        self._first, self._phases, self._open = (step, time.monotonic()), [], False

    @_never_raises
    def on_phase(self, phase: str) -> None:
        """The run does something else from now on, one of `PHASES`."""
        now = time.time()
        if self._open and self.trace_exporter:
            self._phases.append(TraceSpan(self.status.phase, self.status.phase_started_s, now))
        self.status.phase, self.status.phase_started_s, self._open = phase, now, True
        self._since = time.monotonic()

    @_never_raises
    def on_episode(self, trajectory: Trajectory) -> None:
        """An episode was played and scored."""
        meters = self.metrics
        self.accepted_episodes += 1
        meters.add("vz_episodes", 1, status=trajectory.status.value)
        meters.add("vz_sampled_tokens", sum(len(turn.action.token_ids) for turn in trajectory.turns))
        done = len(trajectory.zooms)
        meters.add("vz_zoom_calls", done, outcome="carried_out")
        meters.add("vz_zoom_calls", trajectory.num_zoom_calls - done, outcome="refused")
        meters.observe("vz_episode_seconds", trajectory.seconds)
        first = trajectory.seconds - sum(sum(turn.seconds) for turn in trajectory.turns)
        meters.observe("vz_clip_wait_seconds", max(0.0, first), kind="overview")
        for turn in trajectory.turns:
            meters.observe("vz_generate_seconds", turn.seconds[0])
            if isinstance(turn.zoom, ZoomRequest):
                meters.observe("vz_clip_wait_seconds", turn.seconds[1], kind="zoom")
                self.clip_waits_s.append(turn.seconds[1])
        if self.trace_exporter and self.trace_exporter.should_trace(str(trajectory.id)):
            self.trace_exporter.export(episode_span(trajectory, time.time(), self.status.run))

    @_never_raises
    def on_rl_step(self, step: int, row: Mapping[str, float], num_groups: int, num_kept: int) -> None:
        """An iteration's figures, as they are logged."""
        self.metrics.add("vz_groups", num_kept, outcome="kept")
        self.metrics.add("vz_groups", num_groups - num_kept, outcome="dropped_records")
        self.metrics.add("vz_nonfinite_values", sum(not math.isfinite(value) for value in row.values()))
        self._came_to(step + 1, row)

    @_never_raises
    def on_progress(self, done: int, row: Mapping[str, float] = MappingProxyType({})) -> None:
        """`done` steps or episodes are behind the run; `row` has figures by the names of `metrics.jsonl`."""
        self._came_to(done, row)

    def _came_to(self, done: int, row: Mapping[str, float]) -> None:
        for metric, labels, value in metrics_from_row(row):
            self.step_gauges[metric.name, "".join(labels.values())] = (labels, value)
        live, first = self.status, self._first
        live.step, live.last_step_s = done, time.time()
        if first is not None and done > first[0] and live.max_steps:
            pace = (time.monotonic() - first[1]) / (done - first[0])
            live.eta_s = pace * max(0, live.max_steps - done)

    @_never_raises
    def on_checkpoint(self, step: int) -> None:
        """A checkpoint after `step` iterations is on disk; it took as long as that was being done."""
        now = time.time()
        self.status.checkpoint = {
            "at_s": now,
            "seconds": time.monotonic() - self._since,
            "iteration": float(step),
        }

    @_never_raises
    def on_step_end(self, step: int) -> None:
        """All of an iteration is done, checkpoint and evaluation included: its trace is sent."""
        now = time.time()
        phases = (*self._phases, TraceSpan(self.status.phase, self.status.phase_started_s, now))
        self._phases, self._open = [], False
        if self.trace_exporter:
            attributes: SpanAttributes = {"vz.run": self.status.run, "vz.step": step}
            self.trace_exporter.export(TraceSpan("iteration", phases[0].start_s, now, attributes, phases))

    def dropped_records(self) -> dict[str, int]:
        """What traces and trackers have given up, by sink."""
        lost = {tracker.name: tracker.dropped for tracker in self.trackers}
        return lost | ({"otlp": self.trace_exporter.dropped} if self.trace_exporter else {})
