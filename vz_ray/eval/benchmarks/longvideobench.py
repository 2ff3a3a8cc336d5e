"""LongVideoBench's validation set, with optional subtitles between the frames.

Source of the metric: accuracy overall, per duration group (15, 60, 600, 3600 s)
and per question category.
"""

from __future__ import annotations

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import Breakdown, accuracy_metrics, extra_label, kind_label
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema
from vz_ray.eval.benchmarks.benchmark import BenchmarkFiles, RecordAdapter, format_question, letter_options
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


def read_record(record: AnnotationRecord, files: BenchmarkFiles) -> Task:
    options = letter_options(record.options("candidates"))
    correct = record.integer("correct_choice")
    if not 0 <= correct < len(options):
        raise record.field_error("correct_choice", f"an index from 0 to {len(options) - 1}")
    duration_group = record.label("duration_group")
    if duration_group not in DURATION_GROUPS:
        raise record.field_error("duration_group", f"one of {', '.join(DURATION_GROUPS)}")
    return Task(
        task_id=record.label("id"),
        video=files.videos.find(record.text("video_path")),
        question=format_question(record.text("question"), options),
        answer=LETTERS[correct],
        kind=record.text("question_category"),
        extra={
            "options": options,
            "duration_group": duration_group,
            "level": record.label("level"),
            "topic_category": record.text("topic_category"),
        },
        subtitles=files.subtitles(record.text("subtitle_path"), record.number("starting_timestamp_for_subtitles")),
    )


ADAPTER = RecordAdapter(
    title="LongVideoBench",
    file_names=("lvb_val.json",),
    schema=SCHEMA,
    read_record=read_record,
    compute_metrics=accuracy_metrics(
        Breakdown("duration group, s", extra_label("duration_group"), DURATION_GROUPS),
        Breakdown("category", kind_label),
    ),
    num_released=1337,
)
