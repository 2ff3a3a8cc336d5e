"""Subtitles: reading their files, and which lines belong between which frames.

Two kinds of files: SubRip (`.srt`, as VideoMME has them), and the lists of
LongVideoBench (`.json`: `{"start": "00:00:01.200", "end": "00:00:03", "line": "..."}` or
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
"""A line shown for less than this counts as shown for as long (source: LongVideoBench's own loader)."""

_CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)"
_SPAN = re.compile(rf"^\s*{_CLOCK}\s*-->\s*{_CLOCK}")
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True, slots=True)
class Subtitle:
    """One line and when it is shown, seconds from the start of the video."""

    start_s: float
    end_s: float
    text: str


def read_subtitles(path: str | Path, offset_s: float = 0.0) -> tuple[Subtitle, ...]:
    """The lines of a file that have text, in order of time.

    Args:
        path: A `.srt` or `.json` file.
        offset_s: What the subtitles' clock shows where the video begins; lines that end before are left out.

    Raises:
        SubtitlesBroken: It is missing, or of another format; names the file and the place.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    lines = _json_lines(path, text) if path.suffix == ".json" else _srt_lines(path, text)
    moved = [replace(line, start_s=line.start_s - offset_s, end_s=line.end_s - offset_s) for line in lines]
    return tuple(sorted((line for line in moved if line.end_s > 0), key=lambda line: line.start_s))


def between_frames(subtitles: Sequence[Subtitle], times: Sequence[float]) -> list[list[Subtitle]]:
    """Lines to show before each of the frames at `times` and after the last: `[len(times) + 1]` lists.

    A line is shown if a frame lies in it, and stands behind the frames up to
    its middle (source: the interleaved form of LongVideoBench).
    """
    found: list[list[Subtitle]] = [[] for _ in range(len(times) + 1)]
    for line in subtitles:
        middle = (line.start_s + line.end_s) / 2
        half = max(MIN_SUBTITLE_S, line.end_s - line.start_s) / 2
        if bisect_left(times, middle - half) < bisect_right(times, middle + half):
            found[bisect_right(times, middle)].append(line)
    return found


def _srt_lines(path: Path, text: str) -> list[Subtitle]:
    found: list[Subtitle] = []
    spans = 0
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        rows = block.strip().split("\n")
        at = next((i for i, row in enumerate(rows) if _SPAN.match(row)), None)
        if at is None:
            continue
        match = _SPAN.match(rows[at])
        assert match is not None
        spans += 1
        found += _line(_seconds(*match.groups()[:3]), _seconds(*match.groups()[3:]), " ".join(rows[at + 1 :]))
    if text.strip() and not spans:
        raise _broken(path, "it has no line such as `00:00:01,000 --> 00:00:03,500`; .srt files have")
    return found


def _json_lines(path: Path, text: str) -> list[Subtitle]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise _broken(path, f"not JSON ({error})") from error
    if not isinstance(rows, list):
        raise _broken(path, f"expected a list of lines, found {type(rows).__name__}")
    found: list[Subtitle] = []
    for index, row in enumerate(rows):
        try:
            found += _json_line(row)
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(
                path,
                f"line {index}: expected start, end and line, or timestamp and text ({error!r}), found "
                f"{str(row)[:80]}",
            ) from error
    return found


def _json_line(row: Any) -> list[Subtitle]:
    if "timestamp" in row:
        start, end = row["timestamp"]
        # Where nobody has said when it ends, it is shown for the shortest time.
        return _line(float(start), float(start) + MIN_SUBTITLE_S if end is None else float(end), row["text"])
    return _line(_clock(row["start"]), _clock(row["end"]), row["line"])


def _line(start_s: float, end_s: float, text: str) -> list[Subtitle]:
    """One line without markup, or none where nothing is left.

    Special tokens of the model are markup too.
    """
    plain = " ".join(_MARKUP.sub("", text).split())
    return [Subtitle(start_s, end_s, plain)] if plain else []


def _clock(text: str) -> float:
    match = re.fullmatch(rf"\s*{_CLOCK}\s*", text)
    if match is None:
        raise ValueError(f"no time such as 00:00:01.500: {text!r}")
    return _seconds(*match.groups())


def _seconds(hours: str | None, minutes: str | None, seconds: str | None) -> float:
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float((seconds or "0").replace(",", "."))


def _broken(path: Path, why: str) -> SubtitleError:
    return SubtitleError(f"subtitles {path}: {why}", "the video's subtitles cannot be read")
