"""VideoMME, with optional subtitles.

Source of the metric: micro average overall, on long videos, and by duration, domain
and task.
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
from vz_ray.eval.benchmarks.subtitle_check import check_subtitles, drop_missing_subtitles
from vz_ray.eval.benchmarks.video_folder import VideoFolder
from vz_ray.utils.errors import UserError

SCHEMA = AnnotationSchema(
    "VideoMME's parquet file",
    (
        "video_id", "duration", "domain", "sub_category", "url", "videoID", "question_id", "task_type",
        "question", "options", "answer",
    ),
)  # fmt: skip
DURATIONS = ("short", "medium", "long")
RELEASED = 2700


def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return the accuracy overall and on long videos, then by duration, domain and task."""
    long = [score for score in scores if score.task.extra["duration"] == "long"]
    return [
        accuracy_metric(scores, "overall"),
        accuracy_metric(long, "long"),
        *accuracy_table(scores, "duration", extra_label("duration"), DURATIONS),
        *accuracy_table(scores, "domain", extra_label("domain")),
        *accuracy_table(scores, "task", kind_label),
    ]


def read(files: BenchmarkFiles) -> Benchmark:
    """Read the parquet file; videos are `{videoID}.mp4`, subtitles `{videoID}.srt`."""
    records = read_annotations(find_annotation_file(files.annotations, "*.parquet"), SCHEMA)
    videos = VideoFolder(files.video_dir)
    tasks = [_task(record, videos, files.subtitle_dir) for record in records]
    notes: tuple[str, ...] = ()
    if files.subtitle_dir is not None:
        tasks = [drop_missing_subtitles(task) for task in tasks]
        if not any(task.subtitles for task in tasks):
            first = records[0].text("videoID")
            raise UserError(
                f"subtitles is {files.subtitle_dir}; it must have files such as {first}.srt for these videos"
            )
        notes = check_subtitles(tasks)
    return Benchmark("VideoMME", tuple(tasks), compute_metrics, num_released=RELEASED, notes=notes)


def _task(record: AnnotationRecord, videos: VideoFolder, subtitle_dir: Path | None) -> Task:
    options, answer = letter_options(record.options("options")), record.text("answer").strip()
    if answer not in options:
        raise record.field_error("answer", f"a letter from A to {max(options)}")
    video = record.text("videoID")
    return Task(
        task_id=record.label("question_id"),
        video=videos.find(f"{video}.mp4"),
        question=format_question(record.text("question"), options),
        answer=answer,
        source="VideoMME",
        kind=record.text("task_type"),
        extra={
            "options": options,
            "duration": record.one_of("duration", DURATIONS),
            "domain": record.text("domain"),
            "sub_category": record.text("sub_category"),
        },
        subtitles=SubtitleFile(str(subtitle_dir / f"{video}.srt")) if subtitle_dir else None,
    )
