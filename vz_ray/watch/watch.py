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

from vz_ray.episode.trajectory import Status, Trajectory
from vz_ray.observe.catalogue import of_row
from vz_ray.observe.live import ITERATION, Live
from vz_ray.observe.traces import Attributes, Span, Traces
from vz_ray.observe.trackers import Tracker
from vz_ray.video.frame import Zoom
from vz_ray.watch.spans import episode_span

log = logging.getLogger(__name__)

PHASES = ("start", "rollout", "learn", "publish", "evaluate", "checkpoint", "export")
"""What a run may be doing."""
_COUNTED = (
    ("vz_episodes", "status", tuple(status.value for status in Status)),
    ("vz_tool_calls", "outcome", ("carried_out", "refused")),
    ("vz_groups", "outcome", ("kept", "dropped")),
)
"""Counters that are there from the start, with every value of their label."""
_RECENT = 512
"""Waits for clips that `vz-ray top` knows of."""

F = TypeVar("F", bound=Callable[..., None])


class Meters(Protocol):
    """Where metrics of the catalogue go; see `Instruments`."""

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def add(self, name: str, amount: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


class NoMeters:
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


class Watch:
    """One run as it tells of itself; without arguments it listens and tells nobody.

    Args:
        run: Name of the run.
        meters: Where metrics go.
        traces: Where traces go; None makes none.
        trackers: Experiment trackers; the metrics log hands its rows on to them.
        unit: What the run counts: one of those of `observe.live`.
        rows: File of its metrics in the run directory.

    Attributes:
        live: Where the run is.
        accepted_episodes: Since the watch began.
        clip_waits_s: What the last clips were waited for.
        figures: Gauges of the last iteration: name, labels and value.
    """

    def __init__(
        self,
        run: str = "",
        meters: Meters | None = None,
        traces: Traces | None = None,
        trackers: Sequence[Tracker] = (),
        *,
        unit: str = ITERATION,
        rows: str = "metrics.jsonl",
    ) -> None:
        self.meters: Meters = meters or NoMeters()
        self.traces, self.trackers = traces, trackers
        now = time.time()
        self.live = Live(run=run, phase_since_s=now, progress_s=now, unit=unit, rows=rows)
        self.mismatch_limit = math.inf
        self.began_s, self.accepted_episodes = now, 0
        self.clip_waits_s: deque[float] = deque(maxlen=_RECENT)
        self.figures: dict[tuple[str, str], tuple[dict[str, str], float]] = {}
        self._phases: list[Span] = []
        self._open, self._since = False, time.monotonic()
        self._first: tuple[int, float] | None = None

    @_never_raises
    def begun(self, iteration: int, iterations: int, mismatch_limit: float = math.inf) -> None:
        """The loop begins, or goes on, `iteration` of `iterations` behind it.

        Args:
            iterations: 0 where nobody knows.
            mismatch_limit: Mismatch of engine and learner at which reinforcement learning stops itself.
        """
        self.live.iteration, self.live.iterations = iteration, iterations
        self.mismatch_limit = mismatch_limit
        self.live.progress_s = time.time()
        for name, label, values in _COUNTED if self.live.unit == ITERATION else ():
            for value in values:
                self.meters.add(name, 0, **{label: value})
        for name in ("vz_sampled_tokens", "vz_nonfinite_values") if self.live.unit == ITERATION else ():
            self.meters.add(name, 0)
        self._first, self._phases, self._open = (iteration, time.monotonic()), [], False

    @_never_raises
    def doing(self, phase: str) -> None:
        """The run does something else from now on, one of `PHASES`."""
        now = time.time()
        if self._open and self.traces:
            self._phases.append(Span(self.live.phase, self.live.phase_since_s, now))
        self.live.phase, self.live.phase_since_s, self._open = phase, now, True
        self._since = time.monotonic()

    @_never_raises
    def accepted(self, trajectory: Trajectory) -> None:
        """An episode was played and scored."""
        meters = self.meters
        self.accepted_episodes += 1
        meters.add("vz_episodes", 1, status=trajectory.status.value)
        meters.add("vz_sampled_tokens", sum(len(turn.action.token_ids) for turn in trajectory.turns))
        done = len(trajectory.zooms)
        meters.add("vz_tool_calls", done, outcome="carried_out")
        meters.add("vz_tool_calls", trajectory.zooms_tried - done, outcome="refused")
        meters.observe("vz_episode_seconds", trajectory.seconds)
        first = trajectory.seconds - sum(sum(turn.seconds) for turn in trajectory.turns)
        meters.observe("vz_clip_wait_seconds", max(0.0, first), kind="overview")
        for turn in trajectory.turns:
            meters.observe("vz_generate_seconds", turn.seconds[0])
            if isinstance(turn.zoom, Zoom):
                meters.observe("vz_clip_wait_seconds", turn.seconds[1], kind="zoom")
                self.clip_waits_s.append(turn.seconds[1])
        if self.traces and self.traces.wanted(str(trajectory.id)):
            self.traces.add(episode_span(trajectory, time.time(), self.live.run))

    @_never_raises
    def iterated(self, iteration: int, row: Mapping[str, float], played: int, kept: int) -> None:
        """An iteration's figures, as they are logged."""
        self.meters.add("vz_groups", kept, outcome="kept")
        self.meters.add("vz_groups", played - kept, outcome="dropped")
        self.meters.add("vz_nonfinite_values", sum(not math.isfinite(value) for value in row.values()))
        self._came_to(iteration + 1, row)

    @_never_raises
    def stepped(self, done: int, row: Mapping[str, float] = MappingProxyType({})) -> None:
        """`done` steps or episodes are behind the run; `row` has figures by the names of `metrics.jsonl`."""
        self._came_to(done, row)

    def _came_to(self, done: int, row: Mapping[str, float]) -> None:
        for metric, labels, value in of_row(row):
            self.figures[metric.name, "".join(labels.values())] = (labels, value)
        live, first = self.live, self._first
        live.iteration, live.progress_s = done, time.time()
        if first is not None and done > first[0] and live.iterations:
            pace = (time.monotonic() - first[1]) / (done - first[0])
            live.left_s = pace * max(0, live.iterations - done)

    @_never_raises
    def saved(self, iteration: int) -> None:
        """A checkpoint after `iteration` iterations is on disk; it took as long as that was being done."""
        now = time.time()
        self.live.checkpoint = {
            "at_s": now,
            "seconds": time.monotonic() - self._since,
            "iteration": float(iteration),
        }

    @_never_raises
    def closed(self, iteration: int) -> None:
        """All of an iteration is done, checkpoint and evaluation included: its trace is sent."""
        now = time.time()
        phases = (*self._phases, Span(self.live.phase, self.live.phase_since_s, now))
        self._phases, self._open = [], False
        if self.traces:
            attributes: Attributes = {"vz.run": self.live.run, "vz.iteration": iteration}
            self.traces.add(Span("iteration", phases[0].start_s, now, attributes, phases))

    def dropped(self) -> dict[str, int]:
        """What traces and trackers have given up, by sink."""
        lost = {tracker.who: tracker.dropped for tracker in self.trackers}
        return lost | ({"otlp": self.traces.dropped} if self.traces else {})
