"""LongVideoBench's validation set, with subtitles between the frames where they are asked for.

Source of the metric: accuracy overall, per duration group (15, 60, 600, 3600 s)
and per category of question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vz_ray.env.task import SubtitleFile, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
    accuracy_table,
    extra_label,
    kind_label,
)
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    read_annotations,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, format_question, letter_options
from vz_ray.eval.benchmarks.subtitle_check import check_subtitles
from vz_ray.eval.benchmarks.video_folder import VideoFolder
from vz_ray.rewards.multiple_choice import LETTERS

SCHEMA = AnnotationSchema(
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


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Accuracy overall, by duration group, by category."""
    return [
        accuracy_metric(samples),
        *accuracy_table(samples, "duration group, s", extra_label("duration_group"), GROUPS),
        *accuracy_table(samples, "category", kind_label),
    ]


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads `lvb_val.json`."""
    records = read_annotations(find_annotation_file(source.annotations, "lvb_val.json"), SCHEMA)
    videos = VideoFolder(source.video_dir)
    tasks = [_task(record, videos, source.subtitle_dir) for record in records]
    notes = check_subtitles(tasks) if source.subtitle_dir else ()
    return Benchmark("LongVideoBench", tuple(tasks), compute_metrics, num_released=RELEASED, notes=notes)


def _task(record: AnnotationRecord, videos: VideoFolder, subtitles: Path | None) -> Task:
    options = letter_options(record.options("candidates"))
    correct = record.integer("correct_choice")
    if not 0 <= correct < len(options):
        raise record.field_error("correct_choice", f"an index from 0 to {len(options) - 1}")
    group = record.label("duration_group")
    if group not in GROUPS:
        raise record.field_error("duration_group", f"one of {', '.join(GROUPS)}")
    starts = record.number("starting_timestamp_for_subtitles")
    path = record.text("subtitle_path")
    return Task(
        task_id=record.label("id"),
        video=videos.find(record.text("video_path")),
        question=format_question(record.text("question"), options),
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
