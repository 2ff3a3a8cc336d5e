"""LVBench: very long videos, several types to a question, and where in the video its answer is.

Source of the metric: accuracy overall, and per type; a question of several
types counts in each. The time reference becomes the task's event, so that a
zoom that shows it can be told from one that does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vz_ray.data.task import Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, accuracy, extra, table_of
from vz_ray.evaluate.benchmarks.files import Record, Schema, find_file, read_records
from vz_ray.evaluate.benchmarks.videos import VideoFolder
from vz_ray.reward import options_of
from vz_ray.reward.choice import LETTERS

VIDEOS = Schema("LVBench's video_info.meta.jsonl", ("key", "type", "video_info", "qa"))
QUESTIONS = Schema("LVBench's qa", ("uid", "question", "answer", "question_type", "time_reference"))
TYPES = (
    "entity recognition", "event understanding", "key information retrieval", "temporal grounding",
    "reasoning", "summarization",
)  # fmt: skip
RELEASED = 1549

_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,3}):(\d{1,2}(?:\.\d+)?)")


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """Accuracy overall, and by type of question."""
    return [
        accuracy(samples),
        *table_of(samples, "question type", extra("question_type"), TYPES),
        *table_of(samples, "video type", extra("video_type")),
    ]


def read(source: Source) -> Benchmark:
    """Reads `video_info.meta.jsonl`; videos are `{key}.mp4`."""
    records = read_records(find_file(source.annotations, "video_info.meta.jsonl"), VIDEOS)
    videos = VideoFolder(source.videos)
    tasks = tuple(task for record in records for task in _tasks(record, videos))
    unread = [task.task_id for task in tasks if not task.events]
    bare = [task.task_id for task in tasks if task.answer not in options_of(task.question)]
    notes = [
        f"{len(unread)} time references cannot be read, first that of question {unread[0]}" if unread else "",
        f"{len(bare)} questions whose options cannot be read, first {bare[0]}: their letters alone count"
        if bare
        else "",
    ]
    return Benchmark("LVBench", tasks, figures, released=RELEASED, notes=tuple(filter(None, notes)))


def _tasks(record: Record, videos: VideoFolder) -> Iterator[Task]:
    video = videos.find(f"{record.text('key')}.mp4")
    for index, values in enumerate(record.items("qa")):
        asked = QUESTIONS.check(values, f"{record.place}, qa {index}")
        types = asked.items("question_type")
        if not all(isinstance(name, str) for name in types):
            raise asked.fault("question_type", "a list of texts")
        answer = asked.text("answer").strip()
        if answer not in LETTERS:
            raise asked.fault("answer", "a letter")
        reference = asked.text("time_reference", empty=True)
        yield Task(
            task_id=asked.label("uid"),
            video=video,
            question=asked.text("question"),
            answer=answer,
            source="LVBench",
            kind=str(types[0]),
            events=seconds_of(reference),
            extra={
                "question_type": types,
                "time_reference": reference,
                "video_type": record.text("type"),
            },
        )


def seconds_of(reference: str) -> tuple[tuple[float, float], ...]:
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
