"""HTML card of one episode: timeline, turns, frames and reward."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vz_ray.env.trajectory import RejectedZoom, TokenContext, Trajectory, Turn
from vz_ray.report.markup import escape, format_clock, format_number
from vz_ray.report.run_data import LoggedEpisode
from vz_ray.report.timeline import EvidenceSpan, timeline
from vz_ray.video.frame import FrameRef, ZoomRequest

_TAG = re.compile(r"(&lt;/?(?:think|answer|video_zoom|tool_response)&gt;)")


def evidence_spans(episode: LoggedEpisode) -> list[EvidenceSpan]:
    return [(float(start), float(end)) for start, end in episode.task.get("evidence_spans", ())]


def choose_episodes(episodes: Sequence[LoggedEpisode], count: int) -> list[LoggedEpisode]:
    """Select `count` different episodes: alternate question kinds and outcomes, most zooms first."""
    heaps: dict[tuple[str, bool], list[LoggedEpisode]] = {}
    for episode in episodes:
        reward = episode.trajectory.reward
        correct = reward is not None and reward.accuracy == 1
        heaps.setdefault((str(episode.task.get("kind", "")), correct), []).append(episode)
    for heap in heaps.values():
        heap.sort(key=lambda episode: -episode.trajectory.num_zoom_calls)
    order = [heaps[key] for key in sorted(heaps, key=lambda key: (not key[1], key[0]))]
    chosen: list[LoggedEpisode] = []
    for rank in range(max(map(len, order), default=0)):
        chosen += [heap[rank] for heap in order if rank < len(heap)]
        if len(chosen) >= count:
            break
    return chosen[:count]


def evenly_spaced_refs(refs: Sequence[FrameRef], max_frames: int) -> list[FrameRef]:
    """Return at most `max_frames` of `refs`, evenly spaced."""
    return list(refs) if len(refs) <= max_frames else [refs[k * len(refs) // max_frames] for k in range(max_frames)]


def shown_frame_refs(trajectory: Trajectory, max_frames: int) -> list[FrameRef]:
    """Return the frames on the card of this episode."""
    return [ref for context in trajectory.contexts for ref in evenly_spaced_refs(context.frame_refs, max_frames)]


def _strip(
    context: TokenContext, thumbnails: Mapping[FrameRef, str], spans: Sequence[EvidenceSpan], max_frames: int
) -> str:
    """Render the frames of a context as thumbnails with times; frames of an evidence span are highlighted."""
    items = []
    for ref in evenly_spaced_refs(context.frame_refs, max_frames):
        hit = any(start <= ref.pts_s < end for start, end in spans)
        picture = thumbnails.get(ref)
        image = f'<img src="{picture}" alt="" loading="lazy">' if picture else '<i class="nopicture"></i>'
        mark = ' class="hit"' if hit else ""
        items.append(f"<li{mark}>{image}<span>{format_clock(ref.pts_s)}</span></li>")
    num_hidden = len(context.frame_refs) - len(items)
    more = f'<li class="more">and {num_hidden} more</li>' if num_hidden else ""
    tiny = (
        " tiny" if context.frame_refs and max(context.frame_refs[0].width, context.frame_refs[0].height) <= 64 else ""
    )
    return f'<ol class="strip{tiny}">{"".join(items)}{more}</ol>' if items else ""


def _turn_text(text: str) -> str:
    """Render the text of a turn with highlighted tags."""
    marked = _TAG.sub(r'<span class="mark">\1</span>', escape(text.strip()))
    return f'<div class="said">{marked}</div>'


def _turn(
    turn: Turn, index: int, thumbnails: Mapping[FrameRef, str], spans: Sequence[EvidenceSpan], max_frames: int
) -> str:
    result = ""
    if isinstance(turn.zoom, ZoomRequest):
        span = f"{format_clock(turn.zoom.start_s)}–{format_clock(turn.zoom.end_s)} at {turn.zoom.fps:g} fps"
        span += "" if turn.requested_fps is None else f" (requested: {turn.requested_fps:g} fps)"
        strip = _strip(turn.observation, thumbnails, spans, max_frames) if turn.observation else ""
        result = f'<p class="got">Zoom {span}</p>{strip}'
    elif isinstance(turn.zoom, RejectedZoom):
        result = f'<p class="got refused">Zoom rejected ({escape(turn.zoom.kind)}): {escape(turn.zoom.message)}</p>'
    return f'<div class="turn"><h4>Turn {index}</h4>{_turn_text(turn.text)}{result}</div>'


def _outcome(trajectory: Trajectory) -> tuple[str, str]:
    """Return the CSS class and the label of the outcome."""
    reward = trajectory.reward
    if reward is None or not reward.valid:
        return "unknown", "not scored"
    return ("right", "correct") if reward.accuracy == 1 else ("wrong", "wrong")


def _facts(episode: LoggedEpisode) -> str:
    """Render answer, ground truth, reward parts and costs as a definition list."""
    trajectory, reward = episode.trajectory, episode.trajectory.reward
    facts = [
        ("Answer", trajectory.answer if trajectory.answer is not None else f"none ({trajectory.status})"),
        ("Ground truth", episode.task.get("answer", "")),
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
    episode: LoggedEpisode,
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
    trajectory, spans = episode.trajectory, evidence_spans(episode)
    css_class, label = _outcome(trajectory)
    turns = "".join(_turn(turn, k, thumbnails, spans, max_frames) for k, turn in enumerate(trajectory.turns, start=1))
    missing = f'<p class="note">Frames are not available: {escape(error)}</p>' if error else ""
    category = f'<span class="kind">{escape(episode.task["kind"])}</span>' if episode.task.get("kind") else ""
    note = (
        f'<p class="note">{escape(trajectory.reward.note)}</p>' if trajectory.reward and trajectory.reward.note else ""
    )
    return (
        f'<article class="episode"><header><span class="badge {css_class}">{label}</span>{category}'
        f"<code>{escape(trajectory.id)}</code></header>"
        f'<p class="question">{escape(episode.task.get("question", ""))}</p>'
        f"{timeline(trajectory, spans)}<dl>{_facts(episode)}</dl>{note}{missing}"
        f"<details{' open' if is_open else ''}><summary>Frames and turns</summary>"
        f"<h4>Overview</h4>{_strip(trajectory.prompt, thumbnails, spans, max_frames)}{turns}</details></article>"
    )
