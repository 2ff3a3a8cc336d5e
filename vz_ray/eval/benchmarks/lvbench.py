"""LVBench: very long videos, questions with several types, and a time reference of the answer.

Source of the metric: accuracy overall and per type; a question counts in each of
its types. The time reference becomes the task's evidence span, so that zoom hits
can be measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import Breakdown, accuracy_metrics, extra_label
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema
from vz_ray.eval.benchmarks.benchmark import BenchmarkFiles, RecordAdapter
from vz_ray.rewards import parse_options
from vz_ray.rewards.multiple_choice import LETTERS

VIDEOS = AnnotationSchema("LVBench's video_info.meta.jsonl", ("key", "type", "video_info", "qa"))
QUESTIONS = AnnotationSchema("LVBench's qa", ("uid", "question", "answer", "question_type", "time_reference"))
TYPES = (
    "entity recognition", "event understanding", "key information retrieval", "temporal grounding",
    "reasoning", "summarization",
)  # fmt: skip

_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,3}):(\d{1,2}(?:\.\d+)?)")


def find_oddities(tasks: Sequence[Task]) -> list[str]:
    no_evidence = [task.task_id for task in tasks if not task.evidence_spans]
    no_options = [task.task_id for task in tasks if task.answer not in parse_options(task.question)]
    notes = []
    if no_evidence:
        notes.append(f"{len(no_evidence)} time references cannot be parsed, first question {no_evidence[0]}")
    if no_options:
        notes.append(
            f"{len(no_options)} questions have options that cannot be parsed, first {no_options[0]}; "
            "only letters count as answers"
        )
    return notes


def read_record(record: AnnotationRecord, files: BenchmarkFiles) -> Iterator[Task]:
    """Videos are `{key}.mp4`."""
    video = files.videos.find(f"{record.text('key')}.mp4")
    for index, values in enumerate(record.items("qa")):
        question = QUESTIONS.check(values, f"{record.location}, qa {index}")
        types = question.items("question_type")
        if not all(isinstance(name, str) for name in types):
            raise question.field_error("question_type", "a list of strings")
        answer = question.text("answer").strip()
        if answer not in LETTERS:
            raise question.field_error("answer", "a letter")
        reference = question.text("time_reference", empty=True)
        yield Task(
            task_id=question.label("uid"),
            video=video,
            question=question.text("question"),
            answer=answer,
            kind=str(types[0]),
            evidence_spans=parse_time_reference(reference),
            extra={
                "question_type": types,
                "time_reference": reference,
                "video_type": record.text("type"),
            },
        )


def parse_time_reference(reference: str) -> tuple[tuple[float, float], ...]:
    """Parse `00:15-00:19` as `((15.0, 19.0),)`; hours are optional, a single time is an instant.

    Return an empty tuple if the reference cannot be parsed or its end precedes its start.
    """
    times = [
        int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
        for hours, minutes, seconds in _CLOCK.findall(reference)
    ]
    pattern = _CLOCK.sub("#", reference).replace(" ", "")
    if pattern == "#":
        return ((times[0], times[0]),)
    if pattern in ("#-#", "#\u2013#", "#~#") and times[0] <= times[1]:
        return ((times[0], times[1]),)
    return ()


ADAPTER = RecordAdapter(
    title="LVBench",
    file_names=("video_info.meta.jsonl",),
    schema=VIDEOS,
    read_record=read_record,
    compute_metrics=accuracy_metrics(
        Breakdown("question type", extra_label("question_type"), TYPES),
        Breakdown("video type", extra_label("video_type")),
    ),
    num_released=1549,
    find_oddities=find_oddities,
)
