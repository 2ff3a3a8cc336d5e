"""LongVideoBench's validation set, with optional subtitles between the frames.

Source of the metric: accuracy overall, per duration group (15, 60, 600, 3600 s)
and per question category.
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
    {"correct_choice": "lvb_test_wo_gt.json, without public answers; use lvb_val.json"},
)  # fmt: skip
DURATION_GROUPS = ("15", "60", "600", "3600")
RELEASED = 1337


def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return the accuracy overall, by duration group and by category."""
    return [
        accuracy_metric(scores),
        *accuracy_table(scores, "duration group, s", extra_label("duration_group"), DURATION_GROUPS),
        *accuracy_table(scores, "category", kind_label),
    ]


def read(files: BenchmarkFiles) -> Benchmark:
    """Read `lvb_val.json`."""
    records = read_annotations(find_annotation_file(files.annotations, "lvb_val.json"), SCHEMA)
    videos = VideoFolder(files.video_dir)
    tasks = [_task(record, videos, files.subtitle_dir) for record in records]
    notes = check_subtitles(tasks) if files.subtitle_dir else ()
    return Benchmark("LongVideoBench", tuple(tasks), compute_metrics, num_released=RELEASED, notes=notes)


def _task(record: AnnotationRecord, videos: VideoFolder, subtitle_dir: Path | None) -> Task:
    options = letter_options(record.options("candidates"))
    correct = record.integer("correct_choice")
    if not 0 <= correct < len(options):
        raise record.field_error("correct_choice", f"an index from 0 to {len(options) - 1}")
    duration_group = record.label("duration_group")
    if duration_group not in DURATION_GROUPS:
        raise record.field_error("duration_group", f"one of {', '.join(DURATION_GROUPS)}")
    subtitle_offset_s = record.number("starting_timestamp_for_subtitles")
    subtitle_path = record.text("subtitle_path")
    return Task(
        task_id=record.label("id"),
        video=videos.find(record.text("video_path")),
        question=format_question(record.text("question"), options),
        answer=LETTERS[correct],
        source="LongVideoBench",
        kind=record.text("question_category"),
        extra={
            "options": options,
            "duration_group": duration_group,
            "level": record.label("level"),
            "topic_category": record.text("topic_category"),
        },
        subtitles=SubtitleFile(str(subtitle_dir / subtitle_path), subtitle_offset_s) if subtitle_dir else None,
    )
