"""One episode: timeline, what was said, what was seen, what it was worth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vz_ray.episode.trajectory import Context, Trajectory, Turn, ZoomRefused
from vz_ray.report.markup import clock, number, text
from vz_ray.report.run_data import Played
from vz_ray.report.timeline import Event, timeline
from vz_ray.video.frame import FrameRef, Zoom

_TAG = re.compile(r"(&lt;/?(?:think|answer|video_zoom|tool_response)&gt;)")


def events_of(played: Played) -> list[Event]:
    return [(float(start), float(end)) for start, end in played.task.get("events", ())]


def choose(candidates: Sequence[Played], count: int) -> list[Played]:
    """`count` episodes that differ: kinds of question and right or wrong in turn, most zooms first."""
    heaps: dict[tuple[str, bool], list[Played]] = {}
    for played in candidates:
        reward = played.trajectory.reward
        right = reward is not None and reward.accuracy == 1
        heaps.setdefault((str(played.task.get("kind", "")), right), []).append(played)
    for heap in heaps.values():
        heap.sort(key=lambda played: -played.trajectory.zooms_tried)
    order = [heaps[key] for key in sorted(heaps, key=lambda key: (not key[1], key[0]))]
    chosen: list[Played] = []
    for rank in range(max(map(len, order), default=0)):
        chosen += [heap[rank] for heap in order if rank < len(heap)]
        if len(chosen) >= count:
            break
    return chosen[:count]


def thinned_refs(refs: Sequence[FrameRef], most: int) -> list[FrameRef]:
    """At most `most` of `refs`, evenly spread."""
    return list(refs) if len(refs) <= most else [refs[k * len(refs) // most] for k in range(most)]


def refs_shown(trajectory: Trajectory, most: int) -> list[FrameRef]:
    """The frames that the card of this episode shows."""
    return [ref for context in trajectory.contexts for ref in thinned_refs(context.refs, most)]


def _strip(context: Context, pictures: Mapping[FrameRef, str], events: Sequence[Event], most: int) -> str:
    """The frames of a context as thumbnails with their times; those of an event are framed."""
    items = []
    for ref in thinned_refs(context.refs, most):
        hit = any(start <= ref.pts_s < end for start, end in events)
        picture = pictures.get(ref)
        image = f'<img src="{picture}" alt="" loading="lazy">' if picture else '<i class="nopicture"></i>'
        mark = ' class="hit"' if hit else ""
        items.append(f"<li{mark}>{image}<span>{clock(ref.pts_s)}</span></li>")
    left_out = len(context.refs) - len(items)
    more = f'<li class="more">and {left_out} more</li>' if left_out else ""
    tiny = " tiny" if context.refs and max(context.refs[0].width, context.refs[0].height) <= 64 else ""
    return f'<ol class="strip{tiny}">{"".join(items)}{more}</ol>' if items else ""


def _said(words: str) -> str:
    """A turn's text, its tags set apart."""
    marked = _TAG.sub(r'<span class="mark">\1</span>', text(words.strip()))
    return f'<div class="said">{marked}</div>'


def _turn(
    turn: Turn, index: int, pictures: Mapping[FrameRef, str], events: Sequence[Event], most: int
) -> str:
    got = ""
    if isinstance(turn.zoom, Zoom):
        span = f"{clock(turn.zoom.start_s)}–{clock(turn.zoom.end_s)} at {turn.zoom.fps:g} fps"
        span += "" if turn.asked_fps is None else f" (asked for: {turn.asked_fps:g} fps)"
        shown = _strip(turn.reply, pictures, events, most) if turn.reply else ""
        got = f'<p class="got">Zoom {span}</p>{shown}'
    elif isinstance(turn.zoom, ZoomRefused):
        got = f'<p class="got refused">Zoom refused ({text(turn.zoom.fault)}): {text(turn.zoom.message)}</p>'
    return f'<div class="turn"><h4>Turn {index}</h4>{_said(turn.text)}{got}</div>'


def _verdict(trajectory: Trajectory) -> tuple[str, str]:
    """A CSS class and a word."""
    reward = trajectory.reward
    if reward is None or not reward.valid:
        return "unknown", "not scored"
    return ("right", "right") if reward.accuracy == 1 else ("wrong", "wrong")


def _facts(played: Played) -> str:
    """Answer, truth, reward parts and costs as a definition list."""
    trajectory, reward = played.trajectory, played.trajectory.reward
    facts = [
        ("Answer", trajectory.answer if trajectory.answer is not None else f"none ({trajectory.status})"),
        ("Truth", played.task.get("answer", "")),
    ]
    if reward is not None:
        facts += [
            ("Reward", number(reward.total, 2)),
            ("Accuracy", f"{reward.accuracy:.3g}"),
            ("Format", number(reward.format, 0)),
            ("Tool", number(reward.tool, 0)),
            *((name.replace("_", " ").capitalize(), number(value, 2)) for name, value in reward.more.items()),
        ]
    facts += [("Frames", len(trajectory.refs)), ("Seconds", number(trajectory.seconds, 2))]
    if trajectory.weight_versions:
        facts.append(("Weights", ", ".join(f"v{version}" for version in trajectory.weight_versions)))
    return "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)


def episode_card(
    played: Played, pictures: Mapping[FrameRef, str], *, most: int, trouble: str = "", opened: bool = False
) -> str:
    """An `<article>`.

    Args:
        played: The episode and its task.
        pictures: Data URI of each frame that could be rebuilt.
        most: Thumbnails per overview or zoom.
        trouble: Why frames could not be rebuilt.
        opened: Whether its details are open to start with.
    """
    trajectory, events = played.trajectory, events_of(played)
    kind, word = _verdict(trajectory)
    turns = "".join(
        _turn(turn, k, pictures, events, most) for k, turn in enumerate(trajectory.turns, start=1)
    )
    missing = f'<p class="note">Frames could not be rebuilt: {text(trouble)}</p>' if trouble else ""
    category = f'<span class="kind">{text(played.task["kind"])}</span>' if played.task.get("kind") else ""
    note = (
        f'<p class="note">{text(trajectory.reward.note)}</p>'
        if trajectory.reward and trajectory.reward.note
        else ""
    )
    return (
        f'<article class="episode"><header><span class="badge {kind}">{word}</span>{category}'
        f"<code>{text(trajectory.id)}</code></header>"
        f'<p class="question">{text(played.task.get("question", ""))}</p>'
        f"{timeline(trajectory, events)}<dl>{_facts(played)}</dl>{note}{missing}"
        f"<details{' open' if opened else ''}><summary>Frames and turns</summary>"
        f"<h4>Overview</h4>{_strip(trajectory.prompt, pictures, events, most)}{turns}</details></article>"
    )
