"""VideoMMMU: three tracks on lectures, up to ten options, open answers, images in the Adaptation track.

Source of the metric: accuracy per track and overall; open answers are compared by
normalized words or number, as in MMMU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import Breakdown, accuracy_metrics, extra_label, kind_label
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema, read_annotations
from vz_ray.eval.benchmarks.answer_scoring import AnswerScore, score_choice, score_open
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, format_question, letter_options
from vz_ray.eval.benchmarks.media_files import image_to_video
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


compute_metrics = accuracy_metrics(
    Breakdown("track", kind_label, TRACKS), Breakdown("subject", extra_label("subject")), name="overall"
)


def score_answer(task: Task, text: str) -> AnswerScore:
    """Score an option or an open answer."""
    return score_open(task, text) if task.extra["question_type"] == OPEN else score_choice(task, text)


def read(files: BenchmarkFiles) -> Benchmark:
    """Read the parquet files of all tracks below a folder, or the file of one track."""
    tasks: list[Task] = []
    for track, file in _files(files.annotations):
        schema = ADAPTATION if track == "Adaptation" else SCHEMA
        tasks += [_task(record, track, files) for record in read_annotations(file, schema)]
    tracks = {task.kind for task in tasks}
    notes = tuple(f"track {track} is missing" for track in TRACKS if track not in tracks)
    return Benchmark(
        "VideoMMMU",
        tuple(tasks),
        compute_metrics,
        score_answer=score_answer,
        num_released=RELEASED,
        notes=notes,
    )


def _files(root: Path) -> list[tuple[str, Path]]:
    """Return the files with their tracks, which are part of the file or folder name."""
    paths = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if not paths:
        raise UserError(f"no parquet file at {root}; VideoMMMU has one for each of {', '.join(TRACKS)}")
    files = []
    for path in paths:
        tracks = [track for track in TRACKS if track.casefold() in str(path.relative_to(root.parent)).casefold()]
        if len(tracks) != 1:
            raise UserError(
                f"{path} names {len(tracks)} tracks ({', '.join(tracks) or '-'}); the path must contain "
                f"exactly one of {', '.join(TRACKS)}"
            )
        files.append((tracks[0], path))
    return sorted(files, key=lambda item: TRACKS.index(item[0]))


def _task(record: AnnotationRecord, track: str, files: BenchmarkFiles) -> Task:
    name, question_type = record.text("id"), record.one_of("question_type", TYPES)
    subject = _SUBJECT.fullmatch(name)
    if subject is None:
        raise record.field_error("id", "an id such as validation_Art_Theory_12")
    options = {} if question_type == OPEN else letter_options(record.options("options"))
    answer = record.option_letter("answer", options) if options else record.label("answer")
    images = (_store_image(record, files.image_dir),) if track == "Adaptation" else ()
    question = format_question(record.text("question"), options)
    return Task(
        task_id=f"{track}/{name}",
        video=files.videos.find(f"{name}.mp4"),
        question=f"{IMAGE_NOTE}\n{question}" if images else question,
        answer=answer,
        source="VideoMMMU",
        kind=track,
        extra={"options": options, "question_type": question_type, "subject": subject[1]},
        images=images,
    )


def _store_image(record: AnnotationRecord, folder: Path) -> str:
    image: Any = record.values["image"]
    if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
        raise record.field_error("image", "an object with bytes and path")
    return image_to_video(image["bytes"], folder, record.location)
