"""One episode: timeline, what was said, what was seen, what it was worth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vz_ray.env.trajectory import RejectedZoom, TokenContext, Trajectory, Turn
from vz_ray.report.markup import escape, format_clock, format_number
from vz_ray.report.run_data import LoggedEpisode
from vz_ray.report.timeline import EvidenceSpan, timeline
from vz_ray.video.frame import FrameRef, ZoomRequest

_TAG = re.compile(r"(&lt;/?(?:think|answer|video_zoom|tool_response)&gt;)")


def events_of(played: LoggedEpisode) -> list[EvidenceSpan]:
    return [(float(start), float(end)) for start, end in played.task.get("evidence_spans", ())]


def choose_episodes(episodes: Sequence[LoggedEpisode], count: int) -> list[LoggedEpisode]:
    """`count` episodes that differ: kinds of question and right or wrong in turn, most zooms first."""
    heaps: dict[tuple[str, bool], list[LoggedEpisode]] = {}
    for played in episodes:
        reward = played.trajectory.reward
        right = reward is not None and reward.accuracy == 1
        heaps.setdefault((str(played.task.get("kind", "")), right), []).append(played)
    for heap in heaps.values():
        heap.sort(key=lambda played: -played.trajectory.num_zoom_calls)
    order = [heaps[key] for key in sorted(heaps, key=lambda key: (not key[1], key[0]))]
    chosen: list[LoggedEpisode] = []
    for rank in range(max(map(len, order), default=0)):
        chosen += [heap[rank] for heap in order if rank < len(heap)]
        if len(chosen) >= count:
            break
    return chosen[:count]


def evenly_spaced_refs(refs: Sequence[FrameRef], max_frames: int) -> list[FrameRef]:
    """At most `max_frames` of `refs`, evenly spread."""
    return (
        list(refs)
        if len(refs) <= max_frames
        else [refs[k * len(refs) // max_frames] for k in range(max_frames)]
    )


def shown_frame_refs(trajectory: Trajectory, max_frames: int) -> list[FrameRef]:
    """The frames that the card of this episode shows."""
    return [
        ref for context in trajectory.contexts for ref in evenly_spaced_refs(context.frame_refs, max_frames)
    ]


def _strip(
    context: TokenContext, pictures: Mapping[FrameRef, str], events: Sequence[EvidenceSpan], most: int
) -> str:
    """The frames of a context as thumbnails with their times; those of an event are framed."""
    items = []
    for ref in evenly_spaced_refs(context.frame_refs, most):
        hit = any(start <= ref.pts_s < end for start, end in events)
        picture = pictures.get(ref)
        image = f'<img src="{picture}" alt="" loading="lazy">' if picture else '<i class="nopicture"></i>'
        mark = ' class="hit"' if hit else ""
        items.append(f"<li{mark}>{image}<span>{format_clock(ref.pts_s)}</span></li>")
    left_out = len(context.frame_refs) - len(items)
    more = f'<li class="more">and {left_out} more</li>' if left_out else ""
    tiny = (
        " tiny"
        if context.frame_refs and max(context.frame_refs[0].width, context.frame_refs[0].height) <= 64
        else ""
    )
    return f'<ol class="strip{tiny}">{"".join(items)}{more}</ol>' if items else ""


def _said(words: str) -> str:
    """A turn's text, its tags set apart."""
    marked = _TAG.sub(r'<span class="mark">\1</span>', escape(words.strip()))
    return f'<div class="said">{marked}</div>'


def _turn(
    turn: Turn, index: int, pictures: Mapping[FrameRef, str], events: Sequence[EvidenceSpan], most: int
) -> str:
    got = ""
    if isinstance(turn.zoom, ZoomRequest):
        span = f"{format_clock(turn.zoom.start_s)}–{format_clock(turn.zoom.end_s)} at {turn.zoom.fps:g} fps"
        span += "" if turn.requested_fps is None else f" (asked for: {turn.requested_fps:g} fps)"
        shown = _strip(turn.observation, pictures, events, most) if turn.observation else ""
        got = f'<p class="got">Zoom {span}</p>{shown}'
    elif isinstance(turn.zoom, RejectedZoom):
        got = (
            f'<p class="got refused">Zoom refused ({escape(turn.zoom.kind)}): {escape(turn.zoom.message)}</p>'
        )
    return f'<div class="turn"><h4>Turn {index}</h4>{_said(turn.text)}{got}</div>'


def _verdict(trajectory: Trajectory) -> tuple[str, str]:
    """A CSS class and a word."""
    reward = trajectory.reward
    if reward is None or not reward.valid:
        return "unknown", "not scored"
    return ("right", "right") if reward.accuracy == 1 else ("wrong", "wrong")


def _facts(played: LoggedEpisode) -> str:
    """Answer, truth, reward parts and costs as a definition list."""
    trajectory, reward = played.trajectory, played.trajectory.reward
    facts = [
        ("Answer", trajectory.answer if trajectory.answer is not None else f"none ({trajectory.status})"),
        ("Truth", played.task.get("answer", "")),
    ]
    if reward is not None:
        facts += [
            ("Reward", format_number(reward.total, 2)),
            ("Accuracy", f"{reward.accuracy:.3g}"),
            ("Format", format_number(reward.format, 0)),
            ("Tool", format_number(reward.tool, 0)),
            *(
                (name.replace("_", " ").capitalize(), format_number(value, 2))
                for name, value in reward.extra.items()
            ),
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
    """An `<article>`.

    Args:
        episode: The episode and its task.
        thumbnails: Data URI of each frame that could be rebuilt.
        max_frames: Thumbnails per overview or zoom.
        error: Why frames could not be rebuilt.
        is_open: Whether its details are open to start with.
    """
    trajectory, events = episode.trajectory, events_of(episode)
    kind, word = _verdict(trajectory)
    turns = "".join(
        _turn(turn, k, thumbnails, events, max_frames) for k, turn in enumerate(trajectory.turns, start=1)
    )
    missing = f'<p class="note">Frames could not be rebuilt: {escape(error)}</p>' if error else ""
    category = f'<span class="kind">{escape(episode.task["kind"])}</span>' if episode.task.get("kind") else ""
    note = (
        f'<p class="note">{escape(trajectory.reward.note)}</p>'
        if trajectory.reward and trajectory.reward.note
        else ""
    )
    return (
        f'<article class="episode"><header><span class="badge {kind}">{word}</span>{category}'
        f"<code>{escape(trajectory.id)}</code></header>"
        f'<p class="question">{escape(episode.task.get("question", ""))}</p>'
        f"{timeline(trajectory, events)}<dl>{_facts(episode)}</dl>{note}{missing}"
        f"<details{' open' if is_open else ''}><summary>Frames and turns</summary>"
        f"<h4>Overview</h4>{_strip(trajectory.prompt, thumbnails, events, max_frames)}{turns}</details></article>"
    )
