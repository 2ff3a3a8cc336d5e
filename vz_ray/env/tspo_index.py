"""Frames chosen beforehand: the index files that TSPO (arXiv 2508.04369) released.

`TSPO_{MLVU,LongVideoBench,VideoMME}_frameIdx.json` is a JSON list of the
benchmark's own records, each with `frame_idx`: native frame numbers as floats,
ascending. A question finds its record by the name of the video's file and the
text of the question; options and ids decide where two are alike.
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
    """One question of an index.

    Attributes:
        index: Its number in the file.
        question: Its text, as `_plain` makes it.
        options: Texts of its options, likewise.
        id: The benchmark's own; empty if there is none.
        frames: Native frame numbers, ascending, each once.
    """

    index: int
    question: str
    options: tuple[str, ...]
    id: str
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TspoIndex:
    """An index file, by video."""

    path: Path
    by_video: Mapping[str, tuple[TspoRecord, ...]]

    def find_frames(self, task: Task) -> tuple[int, ...] | None:
        """The frames chosen for `task`; None if the file has no record of it.

        Raises:
            UserError: Several records fit, and they differ in their frames.
        """
        asked = _normalize(task.question)
        fit = [record for record in self.by_video.get(_stem(task.video), ()) if record.question in asked]
        longest = max((len(record.question) for record in fit), default=0)
        fit = [record for record in fit if len(record.question) == longest]
        for closer in (
            [record for record in fit if all(option in asked for option in record.options)],
            [record for record in fit if record.id and record.id == task.task_id.rpartition("/")[2]],
        ):
            if len({record.frames for record in fit}) > 1:
                fit = closer or fit
        if len({record.frames for record in fit}) > 1:
            places = " and ".join(str(record.index) for record in fit[:2])
            raise UserError(
                f"{self.path}: records {places} both fit task {task.task_id!r} and choose other frames; "
                "take one of them out"
            )
        return fit[0].frames if fit else None


@functools.lru_cache(maxsize=8)
def load_tspo_index(path: str) -> TspoIndex:
    """Reads an index file; the same object for the same path.

    Raises:
        UserError: It is missing or of another format; the message names file, record and value.
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
    for place, row in enumerate(rows):
        where = f"the TSPO index {path}, record {place}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, found {type(row).__name__}")
        videos = {_stem(str(row[key])) for key in TSPO_VIDEO_KEYS if row.get(key)}
        if not videos or not isinstance(row.get("question"), str):
            raise UserError(f"{where} has no question, or no video ({', '.join(TSPO_VIDEO_KEYS)})")
        record = _record(row, place, where)
        for video in videos:
            by_video[video].append(record)
    return TspoIndex(Path(path), {video: tuple(records) for video, records in by_video.items()})


def _record(row: Mapping[str, Any], place: int, where: str) -> TspoRecord:
    options: list[Any] = next((row[key] for key in OPTION_KEYS if isinstance(row.get(key), list)), [])
    id = next((str(row[key]) for key in ID_KEYS if key in row), "")
    texts = tuple(_normalize(str(option)) for option in options)
    return TspoRecord(place, _normalize(row["question"]), texts, id, _frames(row.get(FRAMES), where))


def _frames(values: Any, where: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {FRAMES} must be a list of frame numbers")
    numbers: list[int] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{where}: {FRAMES} holds {value!r}, which is no frame number")
        if value < 0 or (numbers and int(value) < numbers[-1]):
            raise UserError(f"{where}: {FRAMES} holds {value!r}; numbers must ascend from 0 on")
        # A video shorter than the number of frames has some of them several times.
        if not numbers or int(value) > numbers[-1]:
            numbers.append(int(value))
    return tuple(numbers)


def _stem(path: str) -> str:
    return Path(path).stem


def _normalize(text: str) -> str:
    """Without differences of case and white space."""
    return " ".join(text.casefold().split())
