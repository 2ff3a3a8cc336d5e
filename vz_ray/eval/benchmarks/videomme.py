"""VideoMME, with optional subtitles.

Source of the metric: micro average overall, on long videos, and by duration, domain
and task.
"""

from __future__ import annotations

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import Breakdown, accuracy_metrics, extra_label, kind_label
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema
from vz_ray.eval.benchmarks.benchmark import BenchmarkFiles, RecordAdapter, format_question, letter_options

SCHEMA = AnnotationSchema(
    "VideoMME's parquet file",
    (
        "video_id", "duration", "domain", "sub_category", "url", "videoID", "question_id", "task_type",
        "question", "options", "answer",
    ),
)  # fmt: skip
DURATIONS = ("short", "medium", "long")


def read_record(record: AnnotationRecord, files: BenchmarkFiles) -> Task:
    """Videos are `{videoID}.mp4`, subtitles `{videoID}.srt`."""
    options = letter_options(record.options("options"))
    video = record.text("videoID")
    return Task(
        task_id=record.label("question_id"),
        video=files.videos.find(f"{video}.mp4"),
        question=format_question(record.text("question"), options),
        answer=record.option_letter("answer", options),
        kind=record.text("task_type"),
        extra={
            "options": options,
            "duration": record.one_of("duration", DURATIONS),
            "domain": record.text("domain"),
            "sub_category": record.text("sub_category"),
        },
        subtitles=files.subtitles(f"{video}.srt"),
    )


ADAPTER = RecordAdapter(
    title="VideoMME",
    file_names=("*.parquet",),
    schema=SCHEMA,
    read_record=read_record,
    compute_metrics=accuracy_metrics(
        Breakdown("duration", extra_label("duration"), DURATIONS),
        Breakdown("domain", extra_label("domain")),
        Breakdown("task", kind_label),
        name="overall",
        subsets={"long": lambda task: task.extra["duration"] == "long"},
    ),
    num_released=2700,
    optional_subtitles=True,
)
