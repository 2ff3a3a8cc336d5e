"""VDC: detailed captions of five kinds, judged by what they say about questions (VDCscore).

The released files have, by video, about nineteen questions drawn from its
reference caption of a kind. A judge answers each from the model's caption
alone, and marks (yes or no) and grades (0 to 5) that answer. A caption is worth
the share of its questions that are right, and its mean grade; figures are
means over captions, and over kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vz_ray.data.task import AnswerType, Check, Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, graded, kind, macro, table_of
from vz_ray.evaluate.benchmarks.files import Schema, find_file, read_records
from vz_ray.evaluate.benchmarks.videos import VideoFolder
from vz_ray.observe.errors import UserError

SCHEMA = Schema("VDC's questions", ("question", "answer"))
ASKED = {
    "camera": "Describe the camera work of this video in detail: kinds of shots, angles, movements of the "
    "camera, transitions, and special effects.",
    "short": "Sum up this video in one detailed sentence: what happens, to whom, and in what mood.",
    "background": "Describe the background of this video in detail: the place, the objects in it, weather "
    "and time of day, and what changes there.",
    "main_object": "Describe the main subject of this video in detail: what it looks like, what it does, "
    "where it is and how it moves, and what it has to do with others.",
    "detailed": "Describe this video in detail, from beginning to end: what happens, the subjects and their "
    "actions, the surroundings, and the camera work.",
}
"""What the model is asked for each kind of caption: the benchmark's own instructions are drawn from lists."""
RELEASED = 5133
"""Captions asked for: five kinds of 1,027 videos; two videos have no questions about their main object."""


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """Mean over kinds of accuracy and grade, and each kind; and as the released script counts.

    That leaves out captions that answer no question rightly.
    """
    right = [sample for sample in samples if sample.score]
    released = table_of(right, "kind, without captions that say nothing right", kind, tuple(ASKED))
    headline = macro(released, "accuracy, released script")
    first, *others = graded(samples, "kind", tuple(ASKED))
    return [first, headline, *others, *released]


def read(source: Source) -> Benchmark:
    """Reads the five question files in a folder, or one of them."""
    root, videos = source.annotations, VideoFolder(source.videos)
    files = [root] if root.is_file() else [find_file(root, f"{name}.jsonl") for name in ASKED]
    tasks: list[Task] = []
    notes: list[str] = []
    for file in files:
        if file.stem not in ASKED:
            raise UserError(f"{file}: VDC's files are {', '.join(f'{name}.jsonl' for name in ASKED)}")
        checks, odd = _checks(file)
        tasks += _tasks(file.stem, checks, videos)
        notes += odd
    released = RELEASED if len(files) == len(ASKED) else 0
    return Benchmark("VDC", tuple(tasks), figures, released=released, notes=tuple(notes))


def _checks(file: Path) -> tuple[dict[str, tuple[Check, ...]], list[str]]:
    """Questions by video, and what was odd about them."""
    found: dict[str, tuple[Check, ...]] = {}
    blank = again = 0
    for record in read_records(file, Schema("VDC's questions, a video on each line", ())):
        for video in record.values:
            place = f"{record.place}, video {video}"
            pairs = [
                SCHEMA.check(item, f"{place}, question {index}")
                for index, item in enumerate(record.items(video))
            ]
            checks = [
                Check(pair.text("question").strip(), pair.text("answer").strip())
                for pair in pairs
                if pair.text("question", empty=True).strip() and pair.text("answer", empty=True).strip()
            ]
            blank += len(pairs) - len(checks)
            again += video in found
            found[video] = tuple(checks)
    odd = [
        (blank, "questions without words were left out"),
        (again, "videos have two lists of questions, and the later one counts"),
    ]
    return found, [f"{file.name}: {count} {what}" for count, what in odd if count]


def _tasks(name: str, checks: dict[str, tuple[Check, ...]], videos: VideoFolder) -> Iterator[Task]:
    for video, questions in checks.items():
        yield Task(
            task_id=f"{name}/{video}",
            video=videos.find(video),
            question=ASKED[name],
            answer="",
            answer_type=AnswerType.CAPTION,
            source="VDC",
            kind=name,
            checks=questions,
        )
