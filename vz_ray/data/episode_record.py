"""Episode records: an episode with its task, one JSON line in `episodes/*.jsonl` and `eval/*.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vz_ray.env.serialization import trajectory_from_dict, trajectory_to_dict
from vz_ray.env.task import AnswerType, CaptionQuestion, ChatHistory, SubtitleFile, Task
from vz_ray.env.trajectory import Trajectory
from vz_ray.utils.json_lines import append_lines, read_complete_lines, to_json_line


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """An episode and its task.

    Attributes:
        task: The question.
        trajectory: The episode, with or without reward.
        stage: Stage that sampled it, for example `rl` or `uniform_32`.
        step: Training step, or step of the evaluated weights.
        advantage: Advantage of the total reward in training; None for other episodes.
    """

    task: Task
    trajectory: Trajectory
    stage: str = ""
    step: int = 0
    advantage: float | None = None


def task_to_dict(task: Task) -> dict[str, Any]:
    """Convert a task to JSON values. `extra` must contain JSON values."""
    data = {
        **asdict(task),
        "answer_type": task.answer_type.value,
        "evidence_spans": [list(span) for span in task.evidence_spans],
        "images": list(task.images),
        "caption_questions": [
            [question.question, question.answer, question.answer_type.value] for question in task.caption_questions
        ],
        "extra_videos": list(task.extra_videos),
    }
    # Omitted by default: only chat requests set these fields.
    for name, default in (("extra_videos", []), ("chat_history", asdict(ChatHistory()))):
        if data[name] == default:
            del data[name]
    return data


def task_from_dict(data: dict[str, Any]) -> Task:
    """Convert the output of `task_to_dict` to a task."""
    subtitles, history = data.get("subtitles"), data.get("chat_history", {})
    converted = {
        "answer_type": AnswerType(data["answer_type"]),
        "evidence_spans": tuple((start, end) for start, end in data["evidence_spans"]),
        "subtitles": SubtitleFile(**subtitles) if subtitles else None,
        "images": tuple(data.get("images", ())),
        "caption_questions": tuple(
            CaptionQuestion(question, answer, AnswerType(answer_type))
            for question, answer, answer_type in data.get("caption_questions", ())
        ),
        "extra_videos": tuple(data.get("extra_videos", ())),
        "chat_history": ChatHistory(
            history.get("system", ""),
            tuple((question, answer) for question, answer in history.get("turns", ())),
        ),
    }
    return Task(**{**data, **converted})


def record_to_dict(record: EpisodeRecord) -> dict[str, Any]:
    return {
        "stage": record.stage,
        "step": record.step,
        "advantage": record.advantage,
        "task": task_to_dict(record.task),
        "trajectory": trajectory_to_dict(record.trajectory),
    }


def record_from_dict(data: dict[str, Any]) -> EpisodeRecord:
    return EpisodeRecord(
        task=task_from_dict(data["task"]),
        trajectory=trajectory_from_dict(data["trajectory"]),
        stage=data["stage"],
        step=data["step"],
        advantage=data["advantage"],
    )


def append_records(path: Path, records: Iterable[EpisodeRecord]) -> None:
    """Append `records` to an episode file."""
    append_lines(path, (to_json_line(record_to_dict(record)) for record in records))


def read_records(path: Path) -> Iterator[EpisodeRecord]:
    """Yield the records of an episode file."""
    return (record_from_dict(value) for value in read_complete_lines(path))
