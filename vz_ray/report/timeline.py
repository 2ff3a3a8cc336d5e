"""Where in the video an episode looked: overview ticks, events, one bar per zoom."""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.episode.trajectory import Trajectory
from vz_ray.report.markup import clock, text
from vz_ray.video.frame import Zoom

Event = tuple[float, float]


def length_of(trajectory: Trajectory, events: Sequence[Event]) -> float:
    """Seconds that the timeline spans: the video's length as far as the episode shows it.

    An overview of n frames stands for n equal parts, so the video ends one part
    after the last of them.
    """
    times = [ref.pts_s for ref in trajectory.prompt.refs]
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    ends = [times[-1] + step] if times else []
    ends += [zoom.end_s for zoom in trajectory.zooms] + [end for _, end in events]
    return max([*ends, 1e-3])


def _box(start: float, end: float, length: float) -> str:
    left = 100 * min(max(start / length, 0.0), 1.0)
    width = 100 * min(max((end - start) / length, 0.0), 1.0)
    return f"left:{left:.3f}%;width:{min(width, 100 - left):.3f}%"


def _at(time: float, length: float) -> str:
    return f"left:{100 * min(time / length, 1.0):.3f}%"


def _bar(turn: int, zoom: Zoom, length: float) -> str:
    words = f"turn {turn}: {clock(zoom.start_s)}–{clock(zoom.end_s)} at {zoom.fps:g} fps"
    left = (zoom.start_s + zoom.end_s) / 2 > 0.55 * length
    at = 100 * (zoom.start_s if left else zoom.end_s) / length
    side = f"right:{100 - at:.3f}%" if left else f"left:{at:.3f}%"
    box = _box(zoom.start_s, zoom.end_s, length)
    return (
        f'<div class="row"><b class="zoom" style="{box}" title="{text(words)}"></b>'
        f'<span class="tag" style="{side}">turn {turn} · {zoom.fps:g} fps</span></div>'
    )


def timeline(trajectory: Trajectory, events: Sequence[Event]) -> str:
    """The timeline of an episode, with the true intervals of what must be seen."""
    length = length_of(trajectory, events)
    bands = "".join(
        f'<b class="event" style="{_box(start, end, length)}" title="event {clock(start)}–{clock(end)}"></b>'
        for start, end in events
    )
    marks = "".join(
        f'<b class="tick" style="{_at(ref.pts_s, length)}" title="{clock(ref.pts_s)}"></b>'
        for ref in trajectory.prompt.refs
    )
    bars = "".join(
        _bar(number, turn.zoom, length)
        for number, turn in enumerate(trajectory.turns, start=1)
        if isinstance(turn.zoom, Zoom)
    )
    scale = "".join(f"<span>{clock(length * k / 4)}</span>" for k in range(5))
    summary = f"Timeline of {clock(length)}: {len(trajectory.zooms)} zooms, {len(events)} events"
    return (
        f'<div class="timeline" role="img" aria-label="{text(summary)}">{bands}'
        f'<div class="row overview">{marks}</div>{bars}</div><div class="scale">{scale}</div>'
    )
