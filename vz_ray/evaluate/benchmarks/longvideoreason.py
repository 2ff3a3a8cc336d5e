"""LongVideoReason-eval.

Source of the metric: accuracy overall and per type of problem. A few released
questions have no options, or something else in their place; they are played
and counted as they are, and the accuracy without them is given beside.
"""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.data.task import Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, accuracy, kind, table_of
from vz_ray.evaluate.benchmarks.files import Record, Schema, find_file, read_records
from vz_ray.evaluate.benchmarks.videos import VideoFolder
from vz_ray.reward import options_of
from vz_ray.reward.choice import LETTERS
from vz_ray.reward.span import last_span

SCHEMA = Schema(
    "LongVideoReason's test.jsonl",
    ("problem_id", "problem", "data_type", "problem_type", "reasoning", "videos", "answer"),
    {"solution": "the RL schema (use the benchmark rl)"},
)
TYPES = ("temporal", "goal", "plot", "spatial")
RELEASED = 1000


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """Accuracy overall, on questions whose options can be read, and by type."""
    readable = [sample for sample in samples if sample.task.extra["options"]]
    return [
        accuracy(samples),
        accuracy(readable, "with readable options"),
        *table_of(samples, "type", kind, TYPES),
    ]


def read(source: Source) -> Benchmark:
    """Reads `test.jsonl`; videos are searched below the folder, as its archives unpack to several."""
    records = read_records(find_file(source.annotations, "test.jsonl"), SCHEMA)
    videos = VideoFolder(source.videos)
    tasks = tuple(_task(record, videos) for record in records)
    odd = [task.task_id for task in tasks if not task.extra["options"]]
    notes = (f"{len(odd)} questions have no readable options, first {odd[0]}",) if odd else ()
    return Benchmark("LongVideoReason", tasks, figures, released=RELEASED, notes=notes)


def _task(record: Record, videos: VideoFolder) -> Task:
    answer = last_span(record.text("answer"))
    if answer is None or answer.removesuffix(".") not in LETTERS:
        raise record.fault("answer", "a letter in its tags, such as <answer>B</answer>")
    answer = answer.removesuffix(".")
    if record.text("data_type") != "video":
        raise record.fault("data_type", "'video'")
    question = record.text("problem").replace("<image>", "").replace("<video>", "").strip()
    options = options_of(question)
    return Task(
        task_id=record.label("problem_id"),
        video=videos.find(_video(record)),
        question=question,
        answer=answer,
        source="LongVideoReason",
        kind=record.one_of("problem_type", TYPES),
        extra={"options": options if answer in options else {}},
    )


def _video(record: Record) -> str:
    """A path, or a list of one."""
    value = record.values["videos"]
    path = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(path, str) or not path:
        raise record.fault("videos", "a path, or a list of one")
    return path
