"""LVBench: very long videos, several types to a question, and where in the video its answer is.

Source of the metric: accuracy overall, and per type; a question of several
types counts in each. The time reference becomes the task's event, so that a
zoom that shows it can be told from one that does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
    accuracy_table,
    extra_label,
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
from vz_ray.rewards.multiple_choice import LETTERS

VIDEOS = AnnotationSchema("LVBench's video_info.meta.jsonl", ("key", "type", "video_info", "qa"))
QUESTIONS = AnnotationSchema("LVBench's qa", ("uid", "question", "answer", "question_type", "time_reference"))
TYPES = (
    "entity recognition", "event understanding", "key information retrieval", "temporal grounding",
    "reasoning", "summarization",
)  # fmt: skip
RELEASED = 1549

_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,3}):(\d{1,2}(?:\.\d+)?)")


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Accuracy overall, and by type of question."""
    return [
        accuracy_metric(samples),
        *accuracy_table(samples, "question type", extra_label("question_type"), TYPES),
        *accuracy_table(samples, "video type", extra_label("video_type")),
    ]


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads `video_info.meta.jsonl`; videos are `{key}.mp4`."""
    records = read_annotations(find_annotation_file(source.annotations, "video_info.meta.jsonl"), VIDEOS)
    videos = VideoFolder(source.video_dir)
    tasks = tuple(task for record in records for task in _tasks(record, videos))
    unread = [task.task_id for task in tasks if not task.evidence_spans]
    bare = [task.task_id for task in tasks if task.answer not in parse_options(task.question)]
    notes = [
        f"{len(unread)} time references cannot be read, first that of question {unread[0]}" if unread else "",
        f"{len(bare)} questions whose options cannot be read, first {bare[0]}: their letters alone count"
        if bare
        else "",
    ]
    return Benchmark(
        "LVBench", tasks, compute_metrics, num_released=RELEASED, notes=tuple(filter(None, notes))
    )


def _tasks(record: AnnotationRecord, videos: VideoFolder) -> Iterator[Task]:
    video = videos.find(f"{record.text('key')}.mp4")
    for index, values in enumerate(record.items("qa")):
        asked = QUESTIONS.check(values, f"{record.location}, qa {index}")
        types = asked.items("question_type")
        if not all(isinstance(name, str) for name in types):
            raise asked.field_error("question_type", "a list of texts")
        answer = asked.text("answer").strip()
        if answer not in LETTERS:
            raise asked.field_error("answer", "a letter")
        reference = asked.text("time_reference", empty=True)
        yield Task(
            task_id=asked.label("uid"),
            video=video,
            question=asked.text("question"),
            answer=answer,
            source="LVBench",
            kind=str(types[0]),
            evidence_spans=parse_time_reference(reference),
            extra={
                "question_type": types,
                "time_reference": reference,
                "video_type": record.text("type"),
            },
        )


def parse_time_reference(reference: str) -> tuple[tuple[float, float], ...]:
    """`00:15-00:19` as `((15.0, 19.0),)`; hours are allowed, a single time is an instant.

    Empty where it cannot be read, or ends before it begins.
    """
    times = [
        int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
        for hours, minutes, seconds in _CLOCK.findall(reference)
    ]
    shape = _CLOCK.sub("#", reference).replace(" ", "")
    if shape == "#":
        return ((times[0], times[0]),)
    if shape in ("#-#", "#\u2013#", "#~#") and times[0] <= times[1]:
        return ((times[0], times[1]),)
    return ()
