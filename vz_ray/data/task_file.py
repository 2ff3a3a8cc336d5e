"""Task files in the RL format of the released VideoZoomer data: a JSON list of questions.

    {"videos": [path], "problem": "<image>...", "solution": "A", "data_source": "...",
     "extra_info": {"answer_type": "multiple_choice"}, "problem_id": "..."}

Paths are relative to the file. An optional `manifest.json` in the same directory adds question kinds
and evidence spans (needle world).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vz_ray.env.task import AnswerType, Task
from vz_ray.utils.errors import UserError
from vz_ray.video.errors import VideoError
from vz_ray.video.video_file import VideoLimits, open_video

MANIFEST = "manifest.json"
SUPPORTED_ANSWER_TYPES = tuple(t.value for t in AnswerType if t is not AnswerType.CAPTION)
"""Answer types of the format, which has no field for caption questions."""
MAX_OPENED_VIDEOS = 512
"""Maximum number of videos opened before a run; each takes a few milliseconds."""


def read_tasks(path: Path | str) -> list[Task]:
    """Read the tasks of a file, in order.

    Raises:
        UserError: The file is missing, empty or invalid, or an id repeats; names the record.
    """
    path = Path(path)
    records = _load(path)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} contains no tasks; it must be a JSON list of questions")
    manifest = path.parent / MANIFEST
    annotations = _load(manifest).get("questions", {}) if manifest.exists() else {}
    tasks = [_parse_task(path, i, record, annotations) for i, record in enumerate(records)]
    seen: set[str] = set()
    for task in tasks:
        if task.task_id in seen:
            raise UserError(f"{path} contains two tasks with id {task.task_id!r}; ids must be unique")
        seen.add(task.task_id)
    return tasks


def check_videos(tasks: list[Task], source: str) -> None:
    """Check that all local videos exist, and open up to `MAX_OPENED_VIDEOS` evenly spread ones.

    Raises:
        UserError: A video is missing or invalid; names the first one.
    """
    local = sorted({task.video for task in tasks if "://" not in task.video})
    missing = [video for video in local if not Path(video).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(local)} videos of {source} do not exist, first {missing[0]}; "
            "paths are relative to the task file"
        )
    for video in local[:: max(1, -(-len(local) // MAX_OPENED_VIDEOS))]:
        try:
            open_video(video, VideoLimits())[0].close()
        except VideoError as error:
            raise UserError(f"{error}; replace the video, or remove its questions from {source}") from error


def encode_tasks(path: Path, tasks: list[Task]) -> bytes:
    """Encode `tasks` as the content of a task file at `path`; video paths become relative."""
    records = [
        {
            "videos": [str(Path(task.video).relative_to(path.parent))],
            "problem": f"<image>{task.question}",
            "solution": task.answer,
            "data_source": task.source,
            "extra_info": {"answer_type": str(task.answer_type)},
            "problem_id": task.task_id,
        }
        for task in tasks
    ]
    return (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode()


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no task file at {path}; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _parse_task(path: Path, index: int, record: Any, annotations: Mapping[str, Any]) -> Task:
    location = f"{path}, record {index}"
    if not isinstance(record, dict):
        raise UserError(f"{location}: expected an object, got {type(record).__name__}")
    for key in ("videos", "problem", "solution"):
        if key not in record:
            raise UserError(f"{location}: key {key!r} is missing")
    videos = record["videos"]
    if not isinstance(videos, list) or len(videos) != 1 or not isinstance(videos[0], str):
        raise UserError(f"{location}: 'videos' must be a list of one path")
    extra = dict(record.get("extra_info") or {})
    answer_type = extra.pop("answer_type", AnswerType.MULTIPLE_CHOICE)
    if answer_type not in SUPPORTED_ANSWER_TYPES:
        raise UserError(
            f"{location}: answer_type is {answer_type!r}; it must be one of {', '.join(SUPPORTED_ANSWER_TYPES)}"
        )
    task_id = str(record.get("problem_id", record.get("doc_id", index)))
    annotation = annotations.get(task_id, {})
    video = videos[0] if "://" in videos[0] else str(path.parent / videos[0])
    return Task(
        task_id=task_id,
        video=video,
        question=str(record["problem"]).replace("<image>", "").strip(),
        answer=str(record["solution"]),
        answer_type=AnswerType(answer_type),
        source=str(record.get("data_source", "")),
        kind=str(annotation.get("kind", "")),
        evidence_spans=tuple((float(a), float(b)) for a, b in annotation.get("events", ())),
        extra={**extra, **{key: annotation[key] for key in annotation if key not in ("kind", "events")}},
    )
