"""An episode together with its task: one JSON line of `episodes/*.jsonl` and `eval/*.jsonl`."""

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
    """A played episode and what it was about.

    Attributes:
        task: The question.
        trajectory: The episode, scored or not.
        stage: Where it was played, for example `rl` or `uniform_32`.
        step: Training iteration, or that of the weights evaluated.
        advantage: What the learner was given, where it was trained on.
    """

    task: Task
    trajectory: Trajectory
    stage: str = ""
    step: int = 0
    advantage: float | None = None


def task_to_dict(task: Task) -> dict[str, Any]:
    """Return `task` as JSON values; `task.extra` must hold JSON values only."""
    data = {
        **asdict(task),
        "answer_type": task.answer_type.value,
        "evidence_spans": [list(span) for span in task.evidence_spans],
        "images": list(task.images),
        "caption_questions": [
            [check.question, check.answer, check.answer_type.value] for check in task.caption_questions
        ],
        "extra_videos": list(task.extra_videos),
    }
    # Only tasks from a chat have these fields.
    for name, default in (("extra_videos", []), ("chat_history", asdict(ChatHistory()))):
        if data[name] == default:
            del data[name]
    return data


def task_from_dict(data: dict[str, Any]) -> Task:
    """Return the task that `task_to_dict` wrote."""
    subtitles, chat = data.get("subtitles"), data.get("chat_history", {})
    fields = {
        "answer_type": AnswerType(data["answer_type"]),
        "evidence_spans": tuple((start, end) for start, end in data["evidence_spans"]),
        "subtitles": SubtitleFile(**subtitles) if subtitles else None,
        "images": tuple(data.get("images", ())),
        "caption_questions": tuple(
            CaptionQuestion(question, answer, AnswerType(kind))
            for question, answer, kind in data.get("caption_questions", ())
        ),
        "extra_videos": tuple(data.get("extra_videos", ())),
        "chat_history": ChatHistory(
            chat.get("system", ""), tuple((question, answer) for question, answer in chat.get("turns", ()))
        ),
    }
    return Task(**{**data, **fields})


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
    """Appends `records` to an episode log."""
    append_lines(path, (to_json_line(record_to_dict(record)) for record in records))


def read_records(path: Path) -> Iterator[EpisodeRecord]:
    """The records of an episode log, in order."""
    return (record_from_dict(value) for value in read_complete_lines(path))
