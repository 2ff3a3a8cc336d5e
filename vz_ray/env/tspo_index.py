"""Frame index files released by TSPO (arXiv 2508.04369).

`TSPO_{MLVU,LongVideoBench,VideoMME}_frameIdx.json` is a JSON list of the benchmark's records, each with
`frame_idx`: native frame numbers as floats, ascending. A record is matched by the name of the video file
and the text of the question; options and ids resolve ambiguities.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError

TSPO_VIDEO_KEYS = ("video", "video_name", "video_path", "videoID", "video_id")
OPTION_KEYS = ("candidates", "options")
ID_KEYS = ("question_id", "id")
FRAMES = "frame_idx"


@dataclass(frozen=True, slots=True)
class TspoRecord:
    """Record of one question, with normalized texts.

    Attributes:
        index: Position in the file.
        id: Id in the benchmark; empty without one.
        frames: Native frame numbers, ascending and unique.
    """

    index: int
    question: str
    options: tuple[str, ...]
    id: str
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TspoIndex:
    """Index file, grouped by the stem of the video file."""

    path: Path
    by_video: Mapping[str, tuple[TspoRecord, ...]]

    def find_frames(self, task: Task) -> tuple[int, ...] | None:
        """Return the frame numbers of `task`; None without a matching record.

        Raises:
            UserError: Several records match and their frames differ.
        """
        question = _normalize(task.question)
        matches = [record for record in self.by_video.get(_stem(task.video), ()) if record.question in question]
        longest = max((len(record.question) for record in matches), default=0)
        matches = [record for record in matches if len(record.question) == longest]
        for better in (
            [record for record in matches if all(option in question for option in record.options)],
            [record for record in matches if record.id and record.id == task.task_id.rpartition("/")[2]],
        ):
            if len({record.frames for record in matches}) > 1:
                matches = better or matches
        if len({record.frames for record in matches}) > 1:
            indices = " and ".join(str(record.index) for record in matches[:2])
            raise UserError(
                f"{self.path}: records {indices} both match task {task.task_id!r} with different frames. "
                "Remove one of them."
            )
        return matches[0].frames if matches else None


@functools.lru_cache(maxsize=8)
def load_tspo_index(path: str) -> TspoIndex:
    """Load an index file. Cached by path.

    Raises:
        UserError: The file is missing or invalid. The message names file, record and value.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the TSPO index {path}: {error.strerror}; check episode.selector.index_file"
        ) from error
    except ValueError as error:
        raise UserError(f"the TSPO index {path} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"the TSPO index {path} must be a JSON list of records")
    by_video: defaultdict[str, list[TspoRecord]] = defaultdict(list)
    for index, row in enumerate(rows):
        location = f"the TSPO index {path}, record {index}"
        if not isinstance(row, dict):
            raise UserError(f"{location}: expected an object, found {type(row).__name__}")
        videos = {_stem(str(row[key])) for key in TSPO_VIDEO_KEYS if row.get(key)}
        if not videos or not isinstance(row.get("question"), str):
            raise UserError(f"{location} has no question, or no video ({', '.join(TSPO_VIDEO_KEYS)})")
        record = _record(row, index, location)
        for video in videos:
            by_video[video].append(record)
    return TspoIndex(Path(path), {video: tuple(records) for video, records in by_video.items()})


def _record(row: Mapping[str, Any], index: int, location: str) -> TspoRecord:
    options: list[Any] = next((row[key] for key in OPTION_KEYS if isinstance(row.get(key), list)), [])
    id = next((str(row[key]) for key in ID_KEYS if key in row), "")
    texts = tuple(_normalize(str(option)) for option in options)
    return TspoRecord(index, _normalize(row["question"]), texts, id, _frames(row.get(FRAMES), location))


def _frames(values: Any, location: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{location}: {FRAMES} must be a list of frame numbers")
    numbers: list[int] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{location}: {FRAMES} holds {value!r}, which is not a frame number")
        if value < 0 or (numbers and int(value) < numbers[-1]):
            raise UserError(f"{location}: {FRAMES} holds {value!r}; numbers must ascend from 0 on")
        # Videos with fewer frames than selected contain duplicates.
        if not numbers or int(value) > numbers[-1]:
            numbers.append(int(value))
    return tuple(numbers)


def _stem(path: str) -> str:
    return Path(path).stem


def _normalize(text: str) -> str:
    """Normalize case and white space."""
    return " ".join(text.casefold().split())
