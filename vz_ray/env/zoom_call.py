"""Reading what the policy said: a zoom call, an answer, or neither.

The strict reader refuses every malformed call with a reason that the model can
act on; nothing is guessed and nothing is clamped.
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
_CALL = re.compile(re.escape(ZOOM_OPEN) + r"(.*?)" + re.escape(ZOOM_CLOSE), re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

CALL_EXAMPLE = '{"segment": [start, end], "fps": n}'
MULTI_VIDEO_EXAMPLE = '{"video": i, "segment": [start, end], "fps": n}'
END_TOLERANCE_S = 0.05
"""A segment may end this long after the video: times are shown rounded to 0.01 s."""
_MIN_SEGMENT_S = 1e-6
"""A shorter segment has no length to speak of; it is shown at no rate that would be fast enough."""


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """One turn, read: at most one of zoom and answer is set.

    Attributes:
        zoom: What is to be carried out, or why nothing is.
        answer: Text of the answer span.
        requested_fps: Frame rate that was asked for, where the rules set another.
    """

    zoom: ZoomRequest | RejectedZoom | None
    answer: str | None
    requested_fps: float | None = None


def extract_answer(text: str) -> str | None:
    """Content of the last answer span, stripped; None if there is none."""
    spans = _ANSWER.findall(text)
    return str(spans[-1]).strip() if spans else None


def parse_turn(
    text: str,
    *,
    duration_s: float,
    max_frames: int,
    inclusive: bool = False,
    fixed_fps: float = 0.0,
    extra_durations_s: Sequence[float] = (),
) -> ParsedTurn:
    """Reads one turn of the policy.

    Args:
        text: The turn, decoded.
        duration_s: Length of the video, seconds; 0 where there is none.
        max_frames: Most frames a zoom may ask for.
        inclusive: Passed on to `ZoomRequest`.
        fixed_fps: Frame rate of every zoom, whatever was asked for; 0 leaves that as it is.
        extra_durations_s: Lengths of further videos, seconds; a call must then say which it means, from 1.
    """
    answer = extract_answer(text)
    calls = _CALL.findall(text)
    if not calls and ZOOM_OPEN not in text:
        return ParsedTurn(None, answer)
    if not calls:
        return ParsedTurn(
            _reject(ZoomErrorKind.INVALID_JSON, f"{ZOOM_OPEN} is not closed by {ZOOM_CLOSE}"), None
        )
    if len(calls) > 1:
        return ParsedTurn(
            _reject(ZoomErrorKind.MULTIPLE_CALLS, f"{len(calls)} zooms in one turn; ask for one"), None
        )
    call = _parse_call(calls[0], inclusive, 1 + len(extra_durations_s))
    if answer is not None:
        both = _reject(ZoomErrorKind.CALL_WITH_ANSWER, "a turn holds either a zoom or an answer, not both")
        return ParsedTurn(both if isinstance(call, RejectedZoom) else replace(both, requested=call), None)
    if isinstance(call, RejectedZoom):
        return ParsedTurn(call, None)
    length_s = (duration_s, *extra_durations_s)[call.video]
    zoom = with_fps(call, fixed_fps, max_frames) if fixed_fps and not _check_segment(call, length_s) else call
    refused = _check_segment(zoom, length_s) or _check_frame_count(zoom, max_frames)
    asked_fps = call.fps if zoom.fps != call.fps else None
    return ParsedTurn(replace(refused, requested=zoom) if refused else zoom, None, asked_fps)


def with_fps(zoom: ZoomRequest, fps: float, max_frames: int) -> ZoomRequest:
    """The same segment at `fps`, or at the nearest rate that gives one frame to `max_frames`.

    Example: `[10, 20]` at 2 with at most 16 frames comes at 1.6, `[10, 11]` at 0.5 comes at 1.
    """
    span = zoom.end_s - zoom.start_s
    if span * fps >= max_frames + 1:
        fps = max_frames / span
    elif span * fps < 1:
        fps = 1 / max(span, _MIN_SEGMENT_S)
    return replace(zoom, fps=fps)


def _reject(fault: ZoomErrorKind, message: str) -> RejectedZoom:
    return RejectedZoom(fault, message)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise KeyError(next(key for key in keys if keys.count(key) > 1))
    return dict(pairs)


def _parse_call(body: str, inclusive: bool, videos: int) -> ZoomRequest | RejectedZoom:
    expected = CALL_EXAMPLE if videos == 1 else MULTI_VIDEO_EXAMPLE
    try:
        call = json.loads(body, object_pairs_hook=_reject_duplicate_keys)
    except KeyError as error:
        return _reject(ZoomErrorKind.WRONG_KEYS, f"key {error.args[0]!r} is given twice; expected {expected}")
    except (ValueError, RecursionError):
        return _reject(ZoomErrorKind.INVALID_JSON, f"the call is not valid JSON; expected {expected}")
    if not isinstance(call, dict) or set(call) - {"video" if videos > 1 else ""} != {"segment", "fps"}:
        found = ", ".join(map(repr, call)) if isinstance(call, dict) else type(call).__name__
        return _reject(ZoomErrorKind.WRONG_KEYS, f"keys must be 'segment' and 'fps', found {found or 'none'}")
    video = _parse_video_index(call, videos)
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


def _parse_video_index(call: dict[str, Any], videos: int) -> int | RejectedZoom:
    """Which of `videos` a call means, from 0; with one there is nothing to say."""
    if videos == 1:
        return 0
    if "video" not in call:
        return _reject(
            ZoomErrorKind.WRONG_KEYS, f"there are {videos} videos: say which one, as in {MULTI_VIDEO_EXAMPLE}"
        )
    video = call["video"]
    if not isinstance(video, int) or isinstance(video, bool):
        return _reject(ZoomErrorKind.NOT_NUMBERS, f"video must be a whole number from 1 to {videos}")
    if not 1 <= video <= videos:
        return _reject(
            ZoomErrorKind.OUT_OF_RANGE, f"there is no video {video}; video must be from 1 to {videos}"
        )
    return video - 1


def _check_segment(zoom: ZoomRequest, duration_s: float) -> RejectedZoom | None:
    """What is wrong with where `zoom` looks in a video of `duration_s`, if anything is."""
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
        return _reject(
            ZoomErrorKind.OUT_OF_RANGE, f"segment {span} is outside the video of {duration_s:.2f} seconds"
        )
    return None


def _check_frame_count(zoom: ZoomRequest, max_frames: int) -> RejectedZoom | None:
    """What is wrong with how many frames `zoom` asks for, if anything is."""
    start, end, fps = zoom.start_s, zoom.end_s, zoom.fps
    span = f"[{start:g}, {end:g}]"
    # Divided by: a segment of next to no length must not make it infinite.
    length = max(end - start, _MIN_SEGMENT_S)
    # Multiplied in floats: a huge fps must be compared before it is made an integer.
    wanted = (end - start) * fps
    if wanted >= max_frames + 1:
        largest_fps = math.floor(100 * max_frames / length) / 100
        fits = (
            f"fps up to {largest_fps:g}" if largest_fps else f"a segment up to {max_frames / fps:.2f} seconds"
        )
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
