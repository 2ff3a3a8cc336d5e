"""HTML timeline of an episode: overview ticks, evidence spans, one bar per zoom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vz_ray.env.trajectory import Trajectory, Turn
from vz_ray.report.markup import escape, format_clock
from vz_ray.video.frame import ZoomRequest

EvidenceSpan = tuple[float, float]


def timeline_length_s(trajectory: Trajectory, spans: Sequence[EvidenceSpan]) -> float:
    """Return the length of the timeline: the video length, as far as the episode shows it.

    The n frames of an overview represent n equal parts, so the video ends one part after the last frame.
    """
    times = [ref.pts_s for ref in trajectory.prompt.frame_refs]
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    ends = [times[-1] + step] if times else []
    ends += [zoom.end_s for zoom in trajectory.zooms] + [end for _, end in spans]
    return max([*ends, 1e-3])


def _box(start: float, end: float, length: float) -> str:
    # Spans beyond the end are drawn at the end.
    left = 100 * min(max(start / length, 0.0), 0.99)
    width = 100 * max(min(end, length) - max(start, 0.0), 0.0) / length
    return f"left:{left:.3f}%;width:{min(width, 100 - left):.3f}%"


def _position(time: float, length: float) -> str:
    return f"left:{100 * min(time / length, 1.0):.3f}%"


def _bar(turn: int, zoom: ZoomRequest, length: float, error: str) -> str:
    """Render a zoom. A rejected zoom may be reversed or outside the video; `error` is the reason."""
    title = f"turn {turn}: {format_clock(zoom.start_s)}–{format_clock(zoom.end_s)} at {zoom.fps:g} fps"
    title += f", rejected: {error}" if error else ""
    start, end = sorted((zoom.start_s, zoom.end_s))
    label_left = (start + end) / 2 > 0.55 * length
    position = min(max(100 * (start if label_left else end) / length, 0.0), 99.0)
    side = f"right:{100 - position:.3f}%" if label_left else f"left:{position:.3f}%"
    box, kind = _box(start, end, length), "zoom refused" if error else "zoom"
    return (
        f'<div class="row"><b class="{kind}" style="{box}" title="{escape(title)}"></b>'
        f'<span class="zoom-label" style="{side}">turn {turn} · {zoom.fps:g} fps</span></div>'
    )


def timeline_zooms(turns: Sequence[Turn]) -> Iterator[tuple[int, ZoomRequest, str]]:
    """Yield the number of each turn with a zoom to draw, the request, and why it was rejected, or an empty string."""
    for number, turn in enumerate(turns, start=1):
        if isinstance(turn.zoom, ZoomRequest):
            yield number, turn.zoom, ""
        elif turn.zoom is not None and turn.zoom.requested is not None:
            yield number, turn.zoom.requested, turn.zoom.message


def timeline(trajectory: Trajectory, spans: Sequence[EvidenceSpan]) -> str:
    """Render the timeline of an episode with its evidence spans."""
    length = timeline_length_s(trajectory, spans)
    bands = "".join(
        f'<b class="event" style="{_box(start, end, length)}" '
        f'title="evidence {format_clock(start)}–{format_clock(end)}"></b>'
        for start, end in spans
    )
    marks = "".join(
        f'<b class="tick" style="{_position(ref.pts_s, length)}" title="{format_clock(ref.pts_s)}"></b>'
        for ref in trajectory.prompt.frame_refs
    )
    bars = "".join(_bar(number, zoom, length, error) for number, zoom, error in timeline_zooms(trajectory.turns))
    scale = "".join(f"<span>{format_clock(length * k / 4)}</span>" for k in range(5))
    summary = f"Timeline of {format_clock(length)}: {len(trajectory.zooms)} zooms, {len(spans)} evidence spans"
    return (
        f'<div class="timeline" role="img" aria-label="{escape(summary)}">{bands}'
        f'<div class="row overview">{marks}</div>{bars}</div><div class="scale">{scale}</div>'
    )
