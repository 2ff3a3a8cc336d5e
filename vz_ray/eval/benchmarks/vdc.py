"""VDC: detailed captions of five kinds, judged through questions (VDCscore).

The released files have about nineteen questions per video and kind of caption.
A judge answers each question from the model's caption only, then scores (yes or no)
and grades (0 to 5) that answer. A caption's score is its fraction of correct
answers, with its mean grade; metrics average over captions, then over kinds.
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
from vz_ray.eval.benchmarks.annotation_files import AnnotationSchema, find_annotation_files, read_annotations
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles
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
"""Prompt for each kind of caption. The benchmark itself samples prompts from lists."""
RELEASED = 5133
"""Number of captions: five kinds of 1,027 videos, minus two videos without main-object questions."""


def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return accuracy and grade over kinds and for each kind, and the accuracy of the released script.

    The released script excludes captions with score 0.
    """
    kinds = tuple(CAPTION_PROMPTS)
    nonzero = [score for score in scores if score.score]
    released = accuracy_table(nonzero, "kind, without captions of score 0", kind_label, kinds)
    headline = macro_average(released, "accuracy, released script")
    first, *others = judge_metrics(scores, "kind", kinds)
    return [first, headline, *others, *released]


def read(files: BenchmarkFiles) -> Benchmark:
    """Read the five question files in a folder, or one of the files."""
    names = [f"{name}.jsonl" for name in CAPTION_PROMPTS]
    paths = find_annotation_files(files.annotations, names)
    tasks: list[Task] = []
    notes: list[str] = []
    for file in paths:
        if file.name not in names:
            raise UserError(f"{file}: VDC's files are {', '.join(names)}")
        questions, file_notes = _read_questions(file)
        tasks += _tasks(file.stem, questions, files)
        notes += file_notes
    released = RELEASED if len(paths) == len(names) else 0
    return Benchmark("VDC", tuple(tasks), compute_metrics, num_released=released, notes=tuple(notes))


def _read_questions(file: Path) -> tuple[dict[str, tuple[CaptionQuestion, ...]], list[str]]:
    """Return questions by video, and notes on blank and duplicate entries."""
    questions_by_video: dict[str, tuple[CaptionQuestion, ...]] = {}
    blank = duplicates = 0
    for record in read_annotations(file, AnnotationSchema("VDC's questions, a video on each line", ())):
        for video in record.values:
            location = f"{record.location}, video {video}"
            pairs = [
                SCHEMA.check(item, f"{location}, question {index}") for index, item in enumerate(record.items(video))
            ]
            questions = [
                CaptionQuestion(pair.text("question").strip(), pair.text("answer").strip())
                for pair in pairs
                if pair.text("question", empty=True).strip() and pair.text("answer", empty=True).strip()
            ]
            blank += len(pairs) - len(questions)
            duplicates += video in questions_by_video
            questions_by_video[video] = tuple(questions)
    notes = []
    if blank:
        notes.append(f"{file.name}: {blank} blank questions were skipped")
    if duplicates:
        notes.append(f"{file.name}: {duplicates} videos have two lists of questions; the last one is used")
    return questions_by_video, notes


def _tasks(
    kind: str, questions_by_video: dict[str, tuple[CaptionQuestion, ...]], files: BenchmarkFiles
) -> Iterator[Task]:
    for video, questions in questions_by_video.items():
        yield Task(
            task_id=f"{kind}/{video}",
            video=files.videos.find(video),
            question=CAPTION_PROMPTS[kind],
            answer="",
            answer_type=AnswerType.CAPTION,
            source="VDC",
            kind=kind,
            caption_questions=questions,
        )
