"""Whether a transcript has the shape that the prompt asks for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

_THINK = r"<think>(?:(?!</?think>).)*</think>"
_ANSWER_TURN = re.compile(rf"{_THINK}.*<answer>.*</answer>", re.DOTALL)
_ZOOM_TURN = re.compile(rf"{_THINK}.*<video_zoom>(.*)</video_zoom>", re.DOTALL)
_END = "<|im_end|>"


def _once(text: str, tag: str) -> bool:
    return text.count(f"<{tag}>") == 1 and text.count(f"</{tag}>") == 1


def _none(text: str, tag: str) -> bool:
    return f"<{tag}>" not in text and f"</{tag}>" not in text


def _answer_turn(text: str) -> bool:
    """`<think>..</think>..<answer>..</answer>`: one pair of each, no zoom."""
    shaped = _once(text, "think") and _once(text, "answer") and _none(text, "video_zoom")
    return shaped and _ANSWER_TURN.fullmatch(text) is not None


def _zoom_turn(text: str, max_frames: int) -> bool:
    """`<think>..</think>..<video_zoom>..</video_zoom>`: one pair of each, no answer, a sound call."""
    if not (_once(text, "think") and _once(text, "video_zoom") and _none(text, "answer")):
        return False
    match = _ZOOM_TURN.fullmatch(text)
    return match is not None and _sound_call(match[1], max_frames)


def _number(value: object) -> bool:
    """A finite JSON number; an integer too long for a double is not one."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _sound_call(call: str, max_frames: int) -> bool:
    """`{"segment": [start, end], "fps": n}` that asks for 1 to `max_frames` frames."""
    try:
        request = json.loads(call)
    except (ValueError, RecursionError):
        return False
    if not isinstance(request, dict) or set(request) != {"segment", "fps"}:
        return False
    segment, fps = request["segment"], request["fps"]
    if not isinstance(segment, list) or len(segment) != 2 or not all(map(_number, [*segment, fps])):
        return False
    frames = (segment[1] - segment[0]) * fps + 1e-6
    return segment[0] >= 0 and segment[1] > segment[0] and fps > 0 and 1 <= frames < max_frames + 1


def is_well_formed(turns: Sequence[str], max_frames: int = 16) -> bool:
    """Whether every turn but the last is a zoom turn and the last is an answer turn.

    Args:
        turns: What the policy said, in order, an end token at a turn's end allowed.
        max_frames: Most frames that a zoom may ask for; as in the episode, the
            count is rounded down.
    """
    texts = [turn.strip().removesuffix(_END).strip() for turn in turns]
    return (
        bool(texts) and _answer_turn(texts[-1]) and all(_zoom_turn(text, max_frames) for text in texts[:-1])
    )
