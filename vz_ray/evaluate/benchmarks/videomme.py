"""VideoMME, without or with its subtitles.

Source of the metric: micro average overall, and by duration, domain and task;
the long videos are reported apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vz_ray.data.task import SubtitleFile, Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source, ask, lettered
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, accuracy, extra, kind, table_of
from vz_ray.evaluate.benchmarks.files import Record, Schema, find_file, read_records
from vz_ray.evaluate.benchmarks.subtitles import checked_subtitles, without_absent
from vz_ray.evaluate.benchmarks.videos import VideoFolder
from vz_ray.observe.errors import UserError

SCHEMA = Schema(
    "VideoMME's parquet file",
    (
        "video_id", "duration", "domain", "sub_category", "url", "videoID", "question_id", "task_type",
        "question", "options", "answer",
    ),
)  # fmt: skip
DURATIONS = ("short", "medium", "long")
RELEASED = 2700


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """Overall and the long videos, then by duration, domain and task."""
    long = [sample for sample in samples if sample.task.extra["duration"] == "long"]
    return [
        accuracy(samples, "overall"),
        accuracy(long, "long"),
        *table_of(samples, "duration", extra("duration"), DURATIONS),
        *table_of(samples, "domain", extra("domain")),
        *table_of(samples, "task", kind),
    ]


def read(source: Source) -> Benchmark:
    """Reads the parquet file; videos are `{videoID}.mp4`, subtitles `{videoID}.srt`."""
    records = read_records(find_file(source.annotations, "*.parquet"), SCHEMA)
    videos = VideoFolder(source.videos)
    tasks = [_task(record, videos, source.subtitles) for record in records]
    notes: tuple[str, ...] = ()
    if source.subtitles is not None:
        tasks = [without_absent(task) for task in tasks]
        if not any(task.subtitles for task in tasks):
            first = records[0].text("videoID")
            raise UserError(f"{source.subtitles} has no subtitles of these videos, such as {first}.srt")
        notes = checked_subtitles(tasks)
    return Benchmark("VideoMME", tuple(tasks), figures, released=RELEASED, notes=notes)


def _task(record: Record, videos: VideoFolder, subtitles: Path | None) -> Task:
    options, answer = lettered(record.options("options")), record.text("answer").strip()
    if answer not in options:
        raise record.fault("answer", f"a letter from A to {max(options)}")
    video = record.text("videoID")
    return Task(
        task_id=record.label("question_id"),
        video=videos.find(f"{video}.mp4"),
        question=ask(record.text("question"), options),
        answer=answer,
        source="VideoMME",
        kind=record.text("task_type"),
        extra={
            "options": options,
            "duration": record.one_of("duration", DURATIONS),
            "domain": record.text("domain"),
            "sub_category": record.text("sub_category"),
        },
        subtitles=SubtitleFile(str(subtitles / f"{video}.srt")) if subtitles else None,
    )
