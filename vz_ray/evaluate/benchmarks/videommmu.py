"""VideoMMMU: three tracks on lectures, options up to J, open answers, images of Adaptation questions.

Source of the metric: accuracy per track and overall; open answers by
normalised words or number, as MMMU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vz_ray.data.task import AnswerType, Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source, ask, lettered
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, accuracy, extra, kind, table_of
from vz_ray.evaluate.benchmarks.files import Record, Schema, read_records
from vz_ray.evaluate.benchmarks.marks import Mark, mark_choice, mark_open
from vz_ray.evaluate.benchmarks.pictures import keep_picture
from vz_ray.evaluate.benchmarks.videos import VideoFolder
from vz_ray.observe.errors import UserError

FIELDS = ("id", "question", "options", "answer", "question_type")
SCHEMA = Schema("VideoMMMU's parquet files", FIELDS)
ADAPTATION = Schema(
    "VideoMMMU's Adaptation track", (*FIELDS, "image"), lacks={"image": "a track without images"}
)
TRACKS = ("Perception", "Comprehension", "Adaptation")
TYPES = ("multiple-choice", "open", "perception")
OPEN = "open"
RELEASED = 900
PICTURE = "The image of this question is shown last, after the frames of the video."

_SUBJECT = re.compile(r"[^_]+_(.+)_\d+")


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """Overall, by track, by subject."""
    return [
        accuracy(samples, "overall"),
        *table_of(samples, "track", kind, TRACKS),
        *table_of(samples, "subject", extra("subject")),
    ]


def mark(task: Task, text: str) -> Mark:
    """An option, or an open answer."""
    return mark_open(task, text) if task.extra["question_type"] == OPEN else mark_choice(task, text)


def read(source: Source) -> Benchmark:
    """Reads the parquet files of all tracks below a folder, or of one track."""
    videos, tasks = VideoFolder(source.videos), list[Task]()
    for track, file in _files(source.annotations):
        schema = ADAPTATION if track == "Adaptation" else SCHEMA
        tasks += [_task(record, track, videos, source.pictures) for record in read_records(file, schema)]
    found = {task.kind for task in tasks}
    notes = tuple(f"the track {track} is not there" for track in TRACKS if track not in found)
    return Benchmark("VideoMMMU", tuple(tasks), figures, mark=mark, released=RELEASED, notes=notes)


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


def _task(record: Record, track: str, videos: VideoFolder, pictures: Path) -> Task:
    name, kind_of = record.text("id"), record.one_of("question_type", TYPES)
    subject = _SUBJECT.fullmatch(name)
    if subject is None:
        raise record.fault("id", "an id such as validation_Art_Theory_12")
    answer = record.label("answer")
    options = {} if kind_of == OPEN else lettered(record.options("options"))
    if options and answer not in options:
        raise record.fault("answer", f"a letter from A to {max(options)}")
    shown = (_picture(record, pictures),) if track == "Adaptation" else ()
    question = ask(record.text("question"), options)
    return Task(
        task_id=f"{track}/{name}",
        video=videos.find(f"{name}.mp4"),
        question=f"{PICTURE}\n{question}" if shown else question,
        answer=answer,
        answer_type=AnswerType.MULTIPLE_CHOICE,
        source="VideoMMMU",
        kind=track,
        extra={"options": options, "question_type": kind_of, "subject": subject[1]},
        pictures=shown,
    )


def _picture(record: Record, folder: Path) -> str:
    image: Any = record.values["image"]
    if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
        raise record.fault("image", "an object with bytes and path")
    return keep_picture(image["bytes"], folder, record.place)
