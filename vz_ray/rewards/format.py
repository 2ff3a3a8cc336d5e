"""Format check: whether a transcript follows the format that the prompt requires."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

_THINK = r"<think>(?:(?!</?think>).)*</think>"
_ANSWER_TURN = re.compile(rf"{_THINK}.*<answer>.*</answer>", re.DOTALL)
_ZOOM_TURN = re.compile(rf"{_THINK}.*<video_zoom>(.*)</video_zoom>", re.DOTALL)
_END = "<|im_end|>"


def _has_one_pair(text: str, tag: str) -> bool:
    return text.count(f"<{tag}>") == 1 and text.count(f"</{tag}>") == 1


def _has_no_tag(text: str, tag: str) -> bool:
    return f"<{tag}>" not in text and f"</{tag}>" not in text


def _is_answer_turn(text: str) -> bool:
    """Match `<think>..</think>..<answer>..</answer>`: one pair of each tag, no zoom."""
    tags_valid = _has_one_pair(text, "think") and _has_one_pair(text, "answer") and _has_no_tag(text, "video_zoom")
    return tags_valid and _ANSWER_TURN.fullmatch(text) is not None


def _is_zoom_turn(text: str, max_frames: int) -> bool:
    """Match `<think>..</think>..<video_zoom>..</video_zoom>`: one pair each, no answer, valid call."""
    if not (_has_one_pair(text, "think") and _has_one_pair(text, "video_zoom") and _has_no_tag(text, "answer")):
        return False
    match = _ZOOM_TURN.fullmatch(text)
    return match is not None and _is_valid_call(match[1], max_frames)


def _is_finite_number(value: object) -> bool:
    """Return whether a JSON value is a number that fits into a finite double."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_valid_call(call: str, max_frames: int) -> bool:
    """Match `{"segment": [start, end], "fps": n}` with 1 to `max_frames` frames."""
    try:
        request = json.loads(call)
    except (ValueError, RecursionError):
        return False
    if not isinstance(request, dict) or set(request) != {"segment", "fps"}:
        return False
    segment, fps = request["segment"], request["fps"]
    if not isinstance(segment, list) or len(segment) != 2 or not all(map(_is_finite_number, [*segment, fps])):
        return False
    frames = (segment[1] - segment[0]) * fps + 1e-6
    return segment[0] >= 0 and segment[1] > segment[0] and fps > 0 and 1 <= frames < max_frames + 1


def is_well_formed(turns: Sequence[str], max_frames: int = 16) -> bool:
    """Return whether the last turn is an answer turn and every other turn is a zoom turn.

    Args:
        turns: Texts of the policy's turns; each may end with an end token.
        max_frames: Maximum frames of a zoom. The requested count is rounded down, as in the environment.
    """
    texts = [turn.strip().removesuffix(_END).strip() for turn in turns]
    if not texts or not _is_answer_turn(texts[-1]):
        return False
    return all(_is_zoom_turn(text, max_frames) for text in texts[:-1])
