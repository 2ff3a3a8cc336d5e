"""VideoMMMU: three tracks on lectures, options up to J, open answers, images of Adaptation questions.

Source of the metric: accuracy per track and overall; open answers by
normalised words or number, as MMMU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
    accuracy_table,
    extra_label,
    kind_label,
)
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema, read_annotations
from vz_ray.eval.benchmarks.answer_scoring import AnswerScore, score_choice, score_open
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, format_question, letter_options
from vz_ray.eval.benchmarks.question_images import image_to_video
from vz_ray.eval.benchmarks.video_folder import VideoFolder
from vz_ray.utils.errors import UserError

FIELDS = ("id", "question", "options", "answer", "question_type")
SCHEMA = AnnotationSchema("VideoMMMU's parquet files", FIELDS)
ADAPTATION = AnnotationSchema(
    "VideoMMMU's Adaptation track",
    (*FIELDS, "image"),
    other_version_omits={"image": "a track without images"},
)
TRACKS = ("Perception", "Comprehension", "Adaptation")
TYPES = ("multiple-choice", "open", "perception")
OPEN = "open"
RELEASED = 900
IMAGE_NOTE = "The image of this question is shown last, after the frames of the video."

_SUBJECT = re.compile(r"[^_]+_(.+)_\d+")


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Overall, by track, by subject."""
    return [
        accuracy_metric(samples, "overall"),
        *accuracy_table(samples, "track", kind_label, TRACKS),
        *accuracy_table(samples, "subject", extra_label("subject")),
    ]


def score_answer(task: Task, text: str) -> AnswerScore:
    """An option, or an open answer."""
    return score_open(task, text) if task.extra["question_type"] == OPEN else score_choice(task, text)


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads the parquet files of all tracks below a folder, or of one track."""
    videos, tasks = VideoFolder(source.video_dir), list[Task]()
    for track, file in _files(source.annotations):
        schema = ADAPTATION if track == "Adaptation" else SCHEMA
        tasks += [_task(record, track, videos, source.image_dir) for record in read_annotations(file, schema)]
    found = {task.kind for task in tasks}
    notes = tuple(f"the track {track} is not there" for track in TRACKS if track not in found)
    return Benchmark(
        "VideoMMMU",
        tuple(tasks),
        compute_metrics,
        score_answer=score_answer,
        num_released=RELEASED,
        notes=notes,
    )


def _files(root: Path) -> list[tuple[str, Path]]:
    """Files with their tracks, which their names or folders' names say."""
    paths = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if not paths:
        raise UserError(f"no parquet file at {root}; VideoMMMU has one for each of {', '.join(TRACKS)}")
    found = []
    for path in paths:
        tracks = [
            track for track in TRACKS if track.casefold() in str(path.relative_to(root.parent)).casefold()
        ]
        if len(tracks) != 1:
            raise UserError(
                f"{path}: whose track is it? its path must name one of {', '.join(TRACKS)}, and names "
                f"{', '.join(tracks) or 'none'}"
            )
        found.append((tracks[0], path))
    return sorted(found, key=lambda item: TRACKS.index(item[0]))


def _task(record: AnnotationRecord, track: str, videos: VideoFolder, pictures: Path) -> Task:
    name, kind_of = record.text("id"), record.one_of("question_type", TYPES)
    subject = _SUBJECT.fullmatch(name)
    if subject is None:
        raise record.field_error("id", "an id such as validation_Art_Theory_12")
    answer = record.label("answer")
    options = {} if kind_of == OPEN else letter_options(record.options("options"))
    if options and answer not in options:
        raise record.field_error("answer", f"a letter from A to {max(options)}")
    shown = (_picture(record, pictures),) if track == "Adaptation" else ()
    question = format_question(record.text("question"), options)
    return Task(
        task_id=f"{track}/{name}",
        video=videos.find(f"{name}.mp4"),
        question=f"{IMAGE_NOTE}\n{question}" if shown else question,
        answer=answer,
        answer_type=AnswerType.MULTIPLE_CHOICE,
        source="VideoMMMU",
        kind=track,
        extra={"options": options, "question_type": kind_of, "subject": subject[1]},
        images=shown,
    )


def _picture(record: AnnotationRecord, folder: Path) -> str:
    image: Any = record.values["image"]
    if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
        raise record.field_error("image", "an object with bytes and path")
    return image_to_video(image["bytes"], folder, record.location)
