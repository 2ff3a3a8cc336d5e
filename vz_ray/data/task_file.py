"""Task files in the RL schema: a JSON list of questions with the paths of their videos.

`{"videos": [path], "problem": "<image>...", "solution": "A", "data_source": "...",
"extra_info": {"answer_type": "multiple_choice"}, "problem_id": "..."}`, as the
released VideoZoomer data; paths are relative to the file. A `manifest.json`
beside it adds what the needle world knows: kinds and event times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vz_ray.env.task import AnswerType, Task
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import VideoError
from vz_ray.video.video_file import VideoLimits, open_video

MANIFEST = "manifest.json"
SUPPORTED_ANSWER_TYPES = tuple(kind.value for kind in AnswerType if kind is not AnswerType.CAPTION)
"""Types that the schema can state; it has no place for what a caption is asked."""
MAX_OPENED_VIDEOS = 512
"""Videos opened before a run: a few milliseconds each."""


def read_tasks(path: Path | str) -> list[Task]:
    """The tasks of one file, in its order.

    Raises:
        UserError: The file is missing, empty, not of the schema, or names a
            task twice; the message says which record.
    """
    path = Path(path)
    records = _load(path)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} holds no tasks: expected a JSON list of questions")
    manifest = path.parent / MANIFEST
    truth = _load(manifest).get("questions", {}) if manifest.exists() else {}
    tasks = [_task(path, i, record, truth) for i, record in enumerate(records)]
    seen: set[str] = set()
    for task in tasks:
        if task.task_id in seen:
            raise UserError(f"{path} has two tasks with id {task.task_id!r}")
        seen.add(task.task_id)
    return tasks


def check_videos(tasks: list[Task], source: str) -> None:
    """Looks for every local video, and opens up to `MAX_OPENED_VIDEOS` of them, evenly spread.

    Raises:
        UserError: Some do not exist, or one is no video; names the first.
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
            raise UserError(f"{error}; replace it, or take its questions out of {source}") from error


def encode_tasks(path: Path, tasks: list[Task]) -> bytes:
    """The file's content for `tasks`, video paths relative to `path`'s folder."""
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
        raise UserError(f"no task file at {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _task(path: Path, index: int, record: Any, truth: Mapping[str, Any]) -> Task:
    where = f"{path}, record {index}"
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, found {type(record).__name__}")
    for key in ("videos", "problem", "solution"):
        if key not in record:
            raise UserError(f"{where}: key {key!r} is missing")
    videos = record["videos"]
    if not isinstance(videos, list) or len(videos) != 1 or not isinstance(videos[0], str):
        raise UserError(f"{where}: 'videos' must be a list of one path")
    extra = dict(record.get("extra_info") or {})
    kind = extra.pop("answer_type", AnswerType.MULTIPLE_CHOICE)
    if kind not in SUPPORTED_ANSWER_TYPES:
        raise UserError(f"{where}: answer_type {kind!r} is none of {', '.join(SUPPORTED_ANSWER_TYPES)}")
    identity = record.get("problem_id", record.get("doc_id", index))
    known = truth.get(str(identity), {})
    video = videos[0] if "://" in videos[0] else str(path.parent / videos[0])
    return Task(
        task_id=str(identity),
        video=video,
        question=str(record["problem"]).replace("<image>", "").strip(),
        answer=str(record["solution"]),
        answer_type=AnswerType(kind),
        source=str(record.get("data_source", "")),
        kind=str(known.get("kind", "")),
        evidence_spans=tuple((float(a), float(b)) for a, b in known.get("events", ())),
        extra={**extra, **{key: value for key, value in known.items() if key not in ("kind", "events")}},
    )
