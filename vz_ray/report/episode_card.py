"""HTML card of one episode: timeline, turns, frames and reward."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.env.trajectory import RejectedZoom, TokenContext, Trajectory, Turn
from vz_ray.report.markup import escape, format_clock, format_number, note
from vz_ray.report.thumbnails import evenly_spaced
from vz_ray.report.timeline import EvidenceSpan, timeline
from vz_ray.video.frame import FrameRef, ZoomRequest

_TAG = re.compile(r"(&lt;/?(?:think|answer|video_zoom|tool_response)&gt;)")


def choose_episodes(episodes: Sequence[EpisodeRecord], count: int) -> list[EpisodeRecord]:
    """Select `count` different episodes: alternate question kinds and outcomes, most zooms first."""
    heaps: dict[tuple[str, bool], list[EpisodeRecord]] = {}
    for episode in episodes:
        reward = episode.trajectory.reward
        correct = reward is not None and reward.accuracy == 1
        heaps.setdefault((episode.task.kind, correct), []).append(episode)
    for heap in heaps.values():
        heap.sort(key=lambda episode: -episode.trajectory.num_zoom_calls)
    order = [heaps[key] for key in sorted(heaps, key=lambda key: (not key[1], key[0]))]
    chosen: list[EpisodeRecord] = []
    for rank in range(max(map(len, order), default=0)):
        chosen += [heap[rank] for heap in order if rank < len(heap)]
        if len(chosen) >= count:
            break
    return chosen[:count]


def shown_frame_refs(trajectory: Trajectory, max_frames: int) -> list[FrameRef]:
    """Return the frames on the card of this episode."""
    return [ref for context in trajectory.contexts for ref in evenly_spaced(context.frame_refs, max_frames)]


def _strip(
    context: TokenContext, thumbnails: Mapping[FrameRef, str], spans: Sequence[EvidenceSpan], max_frames: int
) -> str:
    """Render the frames of a context as thumbnails with times; frames of an evidence span are highlighted."""
    items = []
    for ref in evenly_spaced(context.frame_refs, max_frames):
        in_event = any(start <= ref.pts_s < end for start, end in spans)
        image_uri = thumbnails.get(ref)
        image = f'<img src="{image_uri}" alt="" loading="lazy">' if image_uri else '<i class="no-image"></i>'
        css_class = ' class="in-event"' if in_event else ""
        items.append(f"<li{css_class}>{image}<span>{format_clock(ref.pts_s)}</span></li>")
    num_hidden = len(context.frame_refs) - len(items)
    more = f'<li class="more">and {num_hidden} more</li>' if num_hidden else ""
    tiny = " tiny" if items and max(context.frame_refs[0].width, context.frame_refs[0].height) <= 64 else ""
    return f'<ol class="frame-strip{tiny}">{"".join(items)}{more}</ol>' if items else ""


def _turn(turn: Turn, index: int, strip: Callable[[TokenContext], str]) -> str:
    result = ""
    if isinstance(turn.zoom, ZoomRequest):
        span = f"{format_clock(turn.zoom.start_s)}–{format_clock(turn.zoom.end_s)} at {turn.zoom.fps:g} fps"
        span += "" if turn.requested_fps is None else f" (requested: {turn.requested_fps:g} fps)"
        clip = strip(turn.observation) if turn.observation else ""
        result = f'<p class="zoom-result">Zoom {span}</p>{clip}'
    elif isinstance(turn.zoom, RejectedZoom):
        result = (
            f'<p class="zoom-result refused">Zoom rejected ({escape(turn.zoom.kind)}): {escape(turn.zoom.message)}</p>'
        )
    text = _TAG.sub(r'<span class="tag-text">\1</span>', escape(turn.text.strip()))
    return f'<div class="turn"><h4>Turn {index}</h4><div class="turn-text">{text}</div>{result}</div>'


def _outcome(trajectory: Trajectory) -> tuple[str, str]:
    """Return the CSS class and the label of the outcome."""
    reward = trajectory.reward
    if reward is None or not reward.valid:
        return "unknown", "not scored"
    return ("right", "correct") if reward.accuracy == 1 else ("wrong", "wrong")


def _facts(episode: EpisodeRecord) -> str:
    """Render answer, ground truth, reward parts and costs as a definition list."""
    trajectory, reward = episode.trajectory, episode.trajectory.reward
    facts: list[tuple[str, object]] = [
        ("Answer", trajectory.answer if trajectory.answer is not None else f"none ({trajectory.status})"),
        ("Ground truth", episode.task.answer),
    ]
    if reward is not None:
        facts += [
            ("Reward", format_number(reward.total, 2)),
            ("Accuracy", f"{reward.accuracy:.3g}"),
            ("Format", format_number(reward.format, 0)),
            ("Tool", format_number(reward.tool, 0)),
            *((name.replace("_", " ").capitalize(), format_number(value, 2)) for name, value in reward.extra.items()),
        ]
    facts += [("Frames", len(trajectory.frame_refs)), ("Seconds", format_number(trajectory.seconds, 2))]
    if trajectory.weight_versions:
        facts.append(("Weights", ", ".join(f"v{version}" for version in trajectory.weight_versions)))
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)


def episode_card(
    episode: EpisodeRecord,
    thumbnails: Mapping[FrameRef, str],
    *,
    max_frames: int,
    error: str = "",
    is_open: bool = False,
) -> str:
    """Render the card as an `<article>`.

    Args:
        episode: The episode and its task.
        thumbnails: Data URI of each available frame.
        max_frames: Maximum thumbnails per overview or zoom.
        error: Reason for missing frames.
        is_open: Whether the details are expanded initially.
    """
    trajectory, spans = episode.trajectory, episode.task.evidence_spans
    css_class, label = _outcome(trajectory)
    strip = partial(_strip, thumbnails=thumbnails, spans=spans, max_frames=max_frames)
    turns = "".join(_turn(turn, k, strip) for k, turn in enumerate(trajectory.turns, start=1))
    missing = note(f"Frames are not available: {error}") if error else ""
    category = f'<span class="kind">{escape(episode.task.kind)}</span>' if episode.task.kind else ""
    reward_note = note(trajectory.reward.note) if trajectory.reward else ""
    return (
        f'<article class="episode"><header><span class="badge {css_class}">{label}</span>{category}'
        f"<code>{escape(trajectory.id)}</code></header>"
        f'<p class="question">{escape(episode.task.question)}</p>'
        f"{timeline(trajectory, spans)}<dl>{_facts(episode)}</dl>{reward_note}{missing}"
        f"<details{' open' if is_open else ''}><summary>Frames and turns</summary>"
        f"<h4>Overview</h4>{strip(trajectory.prompt)}{turns}</details></article>"
    )
