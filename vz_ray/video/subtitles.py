"""Subtitle files, and placement of subtitles between frames.

Formats: SubRip (`.srt`, VideoMME) and the lists of LongVideoBench (`.json`:
`{"start": "00:00:01.200", "end": "00:00:03", "line": "..."}` or
`{"timestamp": [1.2, 3.0], "text": "..."}`).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vz_ray.video.errors import SubtitleError

MIN_SUBTITLE_S = 1.0
"""Minimum display time of a line, seconds (source: LongVideoBench's loader)."""

_CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)"
_SPAN = re.compile(rf"^\s*{_CLOCK}\s*-->\s*{_CLOCK}")
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True, slots=True)
class Subtitle:
    """One line with its display time, seconds from the start of the video."""

    start_s: float
    end_s: float
    text: str


def read_subtitles(path: str | Path, offset_s: float = 0.0) -> tuple[Subtitle, ...]:
    """Read the lines of a file that contain text, ordered by time.

    Args:
        path: A `.srt` or `.json` file.
        offset_s: Subtitle time at the start of the video. Lines that end before it are dropped.

    Raises:
        SubtitleError: The file is missing or has another format; names the file and the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise _error(path, error.strerror or str(error)) from error
    lines = _json_lines(path, text) if path.suffix == ".json" else _srt_lines(path, text)
    shifted = [replace(line, start_s=line.start_s - offset_s, end_s=line.end_s - offset_s) for line in lines]
    return tuple(sorted((line for line in shifted if line.end_s > 0), key=lambda line: line.start_s))


def between_frames(subtitles: Sequence[Subtitle], times: Sequence[float]) -> list[list[Subtitle]]:
    """Return the lines before each frame and after the last frame: `[len(times) + 1]` lists.

    A line is included if a frame is within its display time, and follows the frames before its
    middle (source: interleaved format of LongVideoBench).
    """
    lines_by_gap: list[list[Subtitle]] = [[] for _ in range(len(times) + 1)]
    for line in subtitles:
        middle = (line.start_s + line.end_s) / 2
        half = max(MIN_SUBTITLE_S, line.end_s - line.start_s) / 2
        if bisect_left(times, middle - half) < bisect_right(times, middle + half):
            lines_by_gap[bisect_right(times, middle)].append(line)
    return lines_by_gap


def _srt_lines(path: Path, text: str) -> list[Subtitle]:
    lines: list[Subtitle] = []
    num_spans = 0
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        rows = block.strip().split("\n")
        span_index = next((i for i, row in enumerate(rows) if _SPAN.match(row)), None)
        if span_index is None:
            continue
        match = _SPAN.match(rows[span_index])
        assert match is not None
        num_spans += 1
        start, end = match.groups()[:3], match.groups()[3:]
        lines += _line(_seconds(*start), _seconds(*end), " ".join(rows[span_index + 1 :]))
    if text.strip() and not num_spans:
        raise _error(path, "no line such as `00:00:01,000 --> 00:00:03,500`, which .srt files contain")
    return lines


def _json_lines(path: Path, text: str) -> list[Subtitle]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise _error(path, f"not JSON ({error})") from error
    if not isinstance(rows, list):
        raise _error(path, f"expected a list of lines, got {type(rows).__name__}")
    lines: list[Subtitle] = []
    for index, row in enumerate(rows):
        try:
            lines += _json_line(row)
        except (KeyError, TypeError, ValueError) as error:
            raise _error(
                path,
                f"line {index}: expected start, end and line, or timestamp and text ({error!r}), got {str(row)[:80]}",
            ) from error
    return lines


def _json_line(row: Any) -> list[Subtitle]:
    if "timestamp" in row:
        start, end = row["timestamp"]
        # Without an end, a line is displayed for the minimum time.
        return _line(float(start), float(start) + MIN_SUBTITLE_S if end is None else float(end), row["text"])
    return _line(_clock(row["start"]), _clock(row["end"]), row["line"])


def _line(start_s: float, end_s: float, text: str) -> list[Subtitle]:
    """Return the line without markup, including special tokens of the model; [] if it is empty."""
    plain = " ".join(_MARKUP.sub("", text).split())
    return [Subtitle(start_s, end_s, plain)] if plain else []


def _clock(text: str) -> float:
    match = re.fullmatch(rf"\s*{_CLOCK}\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a time such as 00:00:01.500")
    return _seconds(*match.groups())


def _seconds(hours: str | None, minutes: str | None, seconds: str | None) -> float:
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float((seconds or "0").replace(",", "."))


def _error(path: Path, cause: str) -> SubtitleError:
    return SubtitleError(f"subtitles {path}: {cause}")
