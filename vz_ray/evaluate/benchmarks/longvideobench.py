"""LongVideoBench's validation set, with subtitles between the frames where they are asked for.

Source of the metric: accuracy overall, per duration group (15, 60, 600, 3600 s)
and per category of question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vz_ray.data.task import SubtitleFile, Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source, ask, lettered
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, accuracy, extra, kind, table_of
from vz_ray.evaluate.benchmarks.files import Record, Schema, find_file, read_records
from vz_ray.evaluate.benchmarks.subtitles import checked_subtitles
from vz_ray.evaluate.benchmarks.videos import VideoFolder
from vz_ray.reward.choice import LETTERS

SCHEMA = Schema(
    "LongVideoBench lvb_val.json",
    (
        "video_id", "question", "question_wo_referring_query", "candidates", "correct_choice", "position",
        "topic_category", "question_category", "level", "id", "video_path", "subtitle_path", "duration_group",
        "starting_timestamp_for_subtitles", "duration", "view_count",
    ),
    {"option0": "the layout of an evaluation toolkit; use lvb_val.json itself"},
    {"correct_choice": "lvb_test_wo_gt.json, whose answers are not public; use lvb_val.json"},
)  # fmt: skip
GROUPS = ("15", "60", "600", "3600")
RELEASED = 1337


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """Accuracy overall, by duration group, by category."""
    return [
        accuracy(samples),
        *table_of(samples, "duration group, s", extra("duration_group"), GROUPS),
        *table_of(samples, "category", kind),
    ]


def read(source: Source) -> Benchmark:
    """Reads `lvb_val.json`."""
    records = read_records(find_file(source.annotations, "lvb_val.json"), SCHEMA)
    videos = VideoFolder(source.videos)
    tasks = [_task(record, videos, source.subtitles) for record in records]
    notes = checked_subtitles(tasks) if source.subtitles else ()
    return Benchmark("LongVideoBench", tuple(tasks), figures, released=RELEASED, notes=notes)


def _task(record: Record, videos: VideoFolder, subtitles: Path | None) -> Task:
    options = lettered(record.options("candidates"))
    correct = record.whole("correct_choice")
    if not 0 <= correct < len(options):
        raise record.fault("correct_choice", f"an index from 0 to {len(options) - 1}")
    group = record.label("duration_group")
    if group not in GROUPS:
        raise record.fault("duration_group", f"one of {', '.join(GROUPS)}")
    starts = record.number("starting_timestamp_for_subtitles")
    path = record.text("subtitle_path")
    return Task(
        task_id=record.label("id"),
        video=videos.find(record.text("video_path")),
        question=ask(record.text("question"), options),
        answer=LETTERS[correct],
        source="LongVideoBench",
        kind=record.text("question_category"),
        extra={
            "options": options,
            "duration_group": group,
            "level": record.label("level"),
            "topic_category": record.text("topic_category"),
        },
        subtitles=SubtitleFile(str(subtitles / path), starts) if subtitles else None,
    )
