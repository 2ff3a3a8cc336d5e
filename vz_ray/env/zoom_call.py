"""Parse a turn of the policy: a zoom call, an answer, or neither.

The parser is strict: it rejects every malformed call with an actionable message, and never guesses or
clamps values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vz_ray.env.trajectory import RejectedZoom, ZoomErrorKind
from vz_ray.video.frame import ZoomRequest

ZOOM_OPEN, ZOOM_CLOSE = "<video_zoom>", "</video_zoom>"
REASONING_OPEN, REASONING_CLOSE = "<think>", "</think>"
_CALL = re.compile(re.escape(ZOOM_OPEN) + r"(.*?)" + re.escape(ZOOM_CLOSE), re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_REASONING = re.compile(f"{REASONING_OPEN}.*?{REASONING_CLOSE}", re.DOTALL)

CALL_EXAMPLE = '{"segment": [start, end], "fps": n}'
MULTI_VIDEO_EXAMPLE = '{"video": i, "segment": [start, end], "fps": n}'
END_TOLERANCE_S = 0.05
"""A segment may end this long after the video, because prompts round times to 0.01 s."""
_MIN_SEGMENT_S = 1e-6
"""Minimum segment length in computations; avoids infinite frame rates."""


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """A parsed turn. At most one of `zoom` and `answer` is set.

    Attributes:
        zoom: The zoom call, valid or rejected.
        answer: Text of the answer span.
        requested_fps: Frame rate in the call, if `fixed_fps` overrode it.
    """

    zoom: ZoomRequest | RejectedZoom | None
    answer: str | None
    requested_fps: float | None = None


def remove_reasoning(text: str, *, must_close: bool = False) -> str:
    """Return a turn without its `<think>` blocks. A call or an answer inside is only quoted.

    Args:
        must_close: A block without `</think>` extends to the end of the turn; if False, it is kept.
    """
    text = _REASONING.sub("", text)
    return text.partition(REASONING_OPEN)[0] if must_close else text


def extract_answer(text: str) -> str | None:
    """Return the stripped content of the last answer span outside the reasoning; None without one."""
    spans = _ANSWER.findall(remove_reasoning(text))
    return str(spans[-1]).strip() if spans else None


def parse_turn(
    text: str,
    *,
    duration_s: float,
    max_frames: int,
    inclusive: bool = False,
    fixed_fps: float = 0.0,
    extra_durations_s: Sequence[float] = (),
    must_close_reasoning: bool = False,
) -> ParsedTurn:
    """Parse one turn of the policy.

    Args:
        duration_s: Duration of the video, seconds; 0 without a video.
        inclusive: See `ZoomRequest`.
        fixed_fps: Frame rate that overrides the one in the call; 0 disables the override.
        extra_durations_s: Durations of further videos, seconds. A call must then contain the number of
            the video, from 1.
        must_close_reasoning: See `remove_reasoning`.
    """
    text = remove_reasoning(text, must_close=must_close_reasoning)
    answer = extract_answer(text)
    calls = _CALL.findall(text)
    if not calls and ZOOM_OPEN not in text:
        return ParsedTurn(None, answer)
    if not calls:
        return ParsedTurn(_reject(ZoomErrorKind.INVALID_JSON, f"{ZOOM_OPEN} is not closed by {ZOOM_CLOSE}"), None)
    if len(calls) > 1:
        return ParsedTurn(_reject(ZoomErrorKind.MULTIPLE_CALLS, f"{len(calls)} zooms in one turn; ask for one"), None)
    call = _parse_call(calls[0], inclusive, 1 + len(extra_durations_s))
    if answer is not None:
        rejected = _reject(ZoomErrorKind.CALL_WITH_ANSWER, "a turn holds either a zoom or an answer, not both")
        return ParsedTurn(rejected if isinstance(call, RejectedZoom) else replace(rejected, requested=call), None)
    if isinstance(call, RejectedZoom):
        return ParsedTurn(call, None)
    video_duration_s = (duration_s, *extra_durations_s)[call.video]
    zoom = call
    if fixed_fps and not _check_segment(call, video_duration_s):
        zoom = with_fps(call, fixed_fps, max_frames)
    error = _check_segment(zoom, video_duration_s) or _check_frame_count(zoom, max_frames)
    requested_fps = call.fps if zoom.fps != call.fps else None
    return ParsedTurn(replace(error, requested=zoom) if error else zoom, None, requested_fps)


def with_fps(zoom: ZoomRequest, fps: float, max_frames: int) -> ZoomRequest:
    """Return the segment at `fps`, or at the nearest rate that yields 1 to `max_frames` frames.

    Example: for at most 16 frames, `[10, 20]` at 2 becomes 1.6, and `[10, 11]` at 0.5 becomes 1.
    """
    span = zoom.end_s - zoom.start_s
    if span * fps >= max_frames + 1:
        fps = max_frames / span
    elif span * fps < 1:
        fps = 1 / max(span, _MIN_SEGMENT_S)
    return replace(zoom, fps=fps)


def _reject(kind: ZoomErrorKind, message: str) -> RejectedZoom:
    return RejectedZoom(kind, message)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise KeyError(next(key for key in keys if keys.count(key) > 1))
    return dict(pairs)


def _parse_call(body: str, inclusive: bool, num_videos: int) -> ZoomRequest | RejectedZoom:
    expected = CALL_EXAMPLE if num_videos == 1 else MULTI_VIDEO_EXAMPLE
    try:
        call = json.loads(body, object_pairs_hook=_reject_duplicate_keys)
    except KeyError as error:
        return _reject(ZoomErrorKind.WRONG_KEYS, f"key {error.args[0]!r} is given twice; expected {expected}")
    except (ValueError, RecursionError):
        return _reject(ZoomErrorKind.INVALID_JSON, f"the call is not valid JSON; expected {expected}")
    if not isinstance(call, dict) or set(call) - {"video" if num_videos > 1 else ""} != {"segment", "fps"}:
        actual = ", ".join(map(repr, call)) if isinstance(call, dict) else type(call).__name__
        return _reject(ZoomErrorKind.WRONG_KEYS, f"keys must be 'segment' and 'fps', found {actual or 'none'}")
    video = _parse_video_index(call, num_videos)
    if isinstance(video, RejectedZoom):
        return video
    segment, fps = call["segment"], call["fps"]
    if not isinstance(segment, list) or len(segment) != 2:
        return _reject(ZoomErrorKind.NOT_NUMBERS, "segment must be a list of two numbers, [start, end]")
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (*segment, fps)):
        return _reject(ZoomErrorKind.NOT_NUMBERS, "segment and fps must be numbers")
    try:
        start, end, rate = float(segment[0]), float(segment[1]), float(fps)
    except OverflowError:
        return _reject(ZoomErrorKind.NOT_FINITE, "segment and fps must be finite numbers")
    if not all(map(math.isfinite, (start, end, rate))):
        return _reject(ZoomErrorKind.NOT_FINITE, "segment and fps must be finite numbers")
    return ZoomRequest(start, end, rate, inclusive, video)


def _parse_video_index(call: dict[str, Any], num_videos: int) -> int | RejectedZoom:
    """Return the index of the video in the call, from 0. With one video, the call has no such key."""
    if num_videos == 1:
        return 0
    if "video" not in call:
        return _reject(
            ZoomErrorKind.WRONG_KEYS,
            f"there are {num_videos} videos: say which one, as in {MULTI_VIDEO_EXAMPLE}",
        )
    video = call["video"]
    if not isinstance(video, int) or isinstance(video, bool):
        return _reject(ZoomErrorKind.NOT_NUMBERS, f"video must be a whole number from 1 to {num_videos}")
    if not 1 <= video <= num_videos:
        return _reject(ZoomErrorKind.OUT_OF_RANGE, f"there is no video {video}; video must be from 1 to {num_videos}")
    return video - 1


def _check_segment(zoom: ZoomRequest, duration_s: float) -> RejectedZoom | None:
    """Return an error if the segment is invalid or outside the video."""
    start, end, fps = zoom.start_s, zoom.end_s, zoom.fps
    span = f"[{start:g}, {end:g}]"
    if not duration_s:
        return _reject(ZoomErrorKind.OUT_OF_RANGE, "there is no video to look at")
    if start < 0 or end < 0 or fps < 0:
        return _reject(ZoomErrorKind.NEGATIVE, f"segment {span} and fps {fps:g} must not be negative")
    if end < start:
        return _reject(ZoomErrorKind.REVERSED, f"segment {span} is reversed; start must come before end")
    if start == end or fps == 0:
        return _reject(ZoomErrorKind.EMPTY, f"segment {span} at fps {fps:g} is empty")
    if start >= duration_s or end > duration_s + END_TOLERANCE_S:
        return _reject(ZoomErrorKind.OUT_OF_RANGE, f"segment {span} is outside the video of {duration_s:.2f} seconds")
    return None


def _check_frame_count(zoom: ZoomRequest, max_frames: int) -> RejectedZoom | None:
    """Return an error if the zoom yields too few or too many frames."""
    start, end, fps = zoom.start_s, zoom.end_s, zoom.fps
    span = f"[{start:g}, {end:g}]"
    # A divisor; must not be zero.
    length = max(end - start, _MIN_SEGMENT_S)
    # Compare as a float, before a huge fps is converted to an integer.
    num_frames = (end - start) * fps
    if num_frames >= max_frames + 1:
        largest_fps = math.floor(100 * max_frames / length) / 100
        fits = f"fps up to {largest_fps:g}" if largest_fps else f"a segment up to {max_frames / fps:.2f} seconds"
        return _reject(
            ZoomErrorKind.TOO_MANY_FRAMES,
            f"segment {span} at fps {fps:g} has more than {max_frames} frames; {fits} would fit",
        )
    if zoom.num_frames < 1:
        smallest = math.ceil(100 / length) / 100
        return _reject(
            ZoomErrorKind.TOO_FEW_FRAMES,
            f"segment {span} at fps {fps:g} has no frame; fps of at least {smallest:g} would",
        )
    return None
