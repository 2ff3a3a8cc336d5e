"""LongVideoReason-eval.

Source of the metric: accuracy overall and per type of problem. A few released
questions have no options, or something else in their place; they are played
and counted as they are, and the accuracy without them is given beside.
"""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
    accuracy_table,
    kind_label,
)
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    read_annotations,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles
from vz_ray.eval.benchmarks.video_folder import VideoFolder
from vz_ray.rewards import parse_options
from vz_ray.rewards.answer_text import last_answer
from vz_ray.rewards.multiple_choice import LETTERS

SCHEMA = AnnotationSchema(
    "LongVideoReason's test.jsonl",
    ("problem_id", "problem", "data_type", "problem_type", "reasoning", "videos", "answer"),
    {"solution": "the RL schema (use the benchmark rl)"},
)
TYPES = ("temporal", "goal", "plot", "spatial")
RELEASED = 1000


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Accuracy overall, on questions whose options can be read, and by type."""
    readable = [sample for sample in samples if sample.task.extra["options"]]
    return [
        accuracy_metric(samples),
        accuracy_metric(readable, "with readable options"),
        *accuracy_table(samples, "type", kind_label, TYPES),
    ]


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads `test.jsonl`; videos are searched below the folder, as its archives unpack to several."""
    records = read_annotations(find_annotation_file(source.annotations, "test.jsonl"), SCHEMA)
    videos = VideoFolder(source.video_dir)
    tasks = tuple(_task(record, videos) for record in records)
    odd = [task.task_id for task in tasks if not task.extra["options"]]
    notes = (f"{len(odd)} questions have no readable options, first {odd[0]}",) if odd else ()
    return Benchmark("LongVideoReason", tasks, compute_metrics, num_released=RELEASED, notes=notes)


def _task(record: AnnotationRecord, videos: VideoFolder) -> Task:
    answer = last_answer(record.text("answer"))
    if answer is None or answer.removesuffix(".") not in LETTERS:
        raise record.field_error("answer", "a letter in its tags, such as <answer>B</answer>")
    answer = answer.removesuffix(".")
    if record.text("data_type") != "video":
        raise record.field_error("data_type", "'video'")
    question = record.text("problem").replace("<image>", "").replace("<video>", "").strip()
    options = parse_options(question)
    return Task(
        task_id=record.label("problem_id"),
        video=videos.find(_video(record)),
        question=question,
        answer=answer,
        source="LongVideoReason",
        kind=record.one_of("problem_type", TYPES),
        extra={"options": options if answer in options else {}},
    )


def _video(record: AnnotationRecord) -> str:
    """A path, or a list of one."""
    value = record.values["videos"]
    path = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(path, str) or not path:
        raise record.field_error("videos", "a path, or a list of one")
    return path
