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

from vz_ray.env.task import AnswerType, CaptionQuestion, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_table,
    judge_metrics,
    kind_label,
    macro_average,
)
from vz_ray.eval.benchmarks.annotation_files import AnnotationSchema, find_annotation_file, read_annotations
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles
from vz_ray.eval.benchmarks.video_folder import VideoFolder
from vz_ray.utils.errors import UserError

SCHEMA = AnnotationSchema("VDC's questions", ("question", "answer"))
CAPTION_PROMPTS = {
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


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Mean over kinds of accuracy and grade, and each kind; and as the released script counts.

    That leaves out captions that answer no question rightly.
    """
    right = [sample for sample in samples if sample.score]
    released = accuracy_table(
        right, "kind, without captions that say nothing right", kind_label, tuple(CAPTION_PROMPTS)
    )
    headline = macro_average(released, "accuracy, released script")
    first, *others = judge_metrics(samples, "kind", tuple(CAPTION_PROMPTS))
    return [first, headline, *others, *released]


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads the five question files in a folder, or one of them."""
    root, videos = source.annotations, VideoFolder(source.video_dir)
    files = (
        [root]
        if root.is_file()
        else [find_annotation_file(root, f"{name}.jsonl") for name in CAPTION_PROMPTS]
    )
    tasks: list[Task] = []
    notes: list[str] = []
    for file in files:
        if file.stem not in CAPTION_PROMPTS:
            raise UserError(
                f"{file}: VDC's files are {', '.join(f'{name}.jsonl' for name in CAPTION_PROMPTS)}"
            )
        checks, odd = _checks(file)
        tasks += _tasks(file.stem, checks, videos)
        notes += odd
    released = RELEASED if len(files) == len(CAPTION_PROMPTS) else 0
    return Benchmark("VDC", tuple(tasks), compute_metrics, num_released=released, notes=tuple(notes))


def _checks(file: Path) -> tuple[dict[str, tuple[CaptionQuestion, ...]], list[str]]:
    """Questions by video, and what was odd about them."""
    found: dict[str, tuple[CaptionQuestion, ...]] = {}
    blank = again = 0
    for record in read_annotations(file, AnnotationSchema("VDC's questions, a video on each line", ())):
        for video in record.values:
            place = f"{record.location}, video {video}"
            pairs = [
                SCHEMA.check(item, f"{place}, question {index}")
                for index, item in enumerate(record.items(video))
            ]
            checks = [
                CaptionQuestion(pair.text("question").strip(), pair.text("answer").strip())
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


def _tasks(name: str, checks: dict[str, tuple[CaptionQuestion, ...]], videos: VideoFolder) -> Iterator[Task]:
    for video, questions in checks.items():
        yield Task(
            task_id=f"{name}/{video}",
            video=videos.find(video),
            question=CAPTION_PROMPTS[name],
            answer="",
            answer_type=AnswerType.CAPTION,
            source="VDC",
            kind=name,
            caption_questions=questions,
        )
