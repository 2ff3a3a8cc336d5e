"""LongVideoReason-eval.

Source of the metric: accuracy overall and per problem type. A few released
questions have missing or malformed options. They are evaluated and counted like
the others; a second metric excludes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import Breakdown, accuracy_metrics, kind_label
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema
from vz_ray.eval.benchmarks.benchmark import BenchmarkFiles, RecordAdapter
from vz_ray.rewards import parse_options
from vz_ray.rewards.answer_text import last_answer
from vz_ray.rewards.multiple_choice import LETTERS

SCHEMA = AnnotationSchema(
    "LongVideoReason's test.jsonl",
    ("problem_id", "problem", "data_type", "problem_type", "reasoning", "videos", "answer"),
    {"solution": "the RL schema (use the benchmark rl)"},
)
TYPES = ("temporal", "goal", "plot", "spatial")


def find_oddities(tasks: Sequence[Task]) -> list[str]:
    malformed = [task.task_id for task in tasks if not task.extra["options"]]
    return [f"{len(malformed)} questions have no readable options, first {malformed[0]}"] if malformed else []


def read_record(record: AnnotationRecord, files: BenchmarkFiles) -> Task:
    answer = last_answer(record.text("answer"))
    if answer is None or answer.removesuffix(".") not in LETTERS:
        raise record.field_error("answer", "a letter in answer tags, such as <answer>B</answer>")
    answer = answer.removesuffix(".")
    if record.text("data_type") != "video":
        raise record.field_error("data_type", "'video'")
    question = record.text("problem").replace("<image>", "").replace("<video>", "").strip()
    options = parse_options(question)
    return Task(
        task_id=record.label("problem_id"),
        video=files.videos.find(_video(record)),
        question=question,
        answer=answer,
        kind=record.one_of("problem_type", TYPES),
        extra={"options": options if answer in options else {}},
    )


def _video(record: AnnotationRecord) -> str:
    """Return the path in `videos`: a string, or a list of one string."""
    value = record.values["videos"]
    path = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(path, str) or not path:
        raise record.field_error("videos", "a path, or a list of one path")
    return path


ADAPTER = RecordAdapter(
    title="LongVideoReason",
    file_names=("test.jsonl",),
    schema=SCHEMA,
    read_record=read_record,
    compute_metrics=accuracy_metrics(
        Breakdown("type", kind_label, TYPES),
        subsets={"with readable options": lambda task: bool(task.extra["options"])},
    ),
    num_released=1000,
    find_oddities=find_oddities,
)
