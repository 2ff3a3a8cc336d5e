"""TempCompass: multiple choice, yes or no, caption matching and captioning, by temporal aspect.

Source of the metric: accuracy of each task overall and by aspect; `average` is the
mean of the first three tasks. A caption is correct if a judge, given the caption
only, answers the first choice question about the same video and aspect correctly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vz_ray.env.task import AnswerType, CaptionQuestion, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    Breakdown,
    TaskScore,
    accuracy_metric,
    accuracy_metrics,
    accuracy_table,
    extra_label,
    group_by,
    kind_label,
    macro_average,
)
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    find_annotation_files,
    read_annotation_json,
)
from vz_ray.eval.benchmarks.answer_scoring import (
    UNPARSED_SCORE,
    AnswerScore,
    AnswerStatus,
    score_choice,
    task_options,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles
from vz_ray.rewards.answer_text import normalize_text, strip_wrapping
from vz_ray.rewards.multiple_choice import LETTERS
from vz_ray.utils.errors import UserError

SCHEMA = AnnotationSchema("TempCompass's questions", ("question", "answer"))
CHOICE, YES_NO, CAPTIONS = "multi-choice", "yes_no", "caption_matching"
RELEASED = {CHOICE: 1580, YES_NO: 2453, CAPTIONS: 1503}
CAPTIONING, CAPTIONS_RELEASED = "captioning", 2004
ASPECTS = ("action", "direction", "speed", "order", "attribute_change")

_LABELED_CAPTION = re.compile(r"^((?:Option|Sentence|Caption) [A-Z0-9]): (.+)$", re.MULTILINE)
_YES_NO = re.compile(r"(yes|no)\b")


def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return the mean over tasks, the accuracy of each task, and of each aspect within a task."""
    tasks = accuracy_table(scores, "task", kind_label, tuple(RELEASED))
    metrics = [macro_average(tasks, "average"), accuracy_metric(scores, "micro"), *tasks]
    for task, members in group_by(scores, kind_label, tuple(RELEASED)).items():
        metrics += accuracy_table(members, f"{task}, by aspect", extra_label("aspect"), ASPECTS)
    return metrics


def score_answer(task: Task, text: str) -> AnswerScore:
    """Score an option, yes or no, or one of two captions, by the kind of task."""
    if task.kind == CHOICE:
        return score_choice(task, text)
    answer = normalize_text(strip_wrapping(text))
    if task.kind == YES_NO:
        match = _YES_NO.match(answer)
        parsed = match[1] if match else None
    else:
        parsed = _caption_letter(task, answer)
    if parsed is None:
        return UNPARSED_SCORE
    return AnswerScore(AnswerStatus.PARSED, float(parsed == task.answer), parsed)


def _caption_letter(task: Task, answer: str) -> str | None:
    """Return the letter of the caption that the answer names by label (`Option 2`, `2`), text, or both."""
    letters = set()
    for letter, caption in task_options(task).items():
        label, text = (normalize_text(part) for part in caption.split(": ", 1))
        names = (label, label.split()[-1])
        if answer in (*names, text) or answer.startswith(tuple(f"{name}:" for name in names)):
            letters.add(letter)
    return letters.pop() if len(letters) == 1 else None


def read(files: BenchmarkFiles) -> Benchmark:
    """Read the question files of the three tasks in a folder, or one of the files."""
    tasks: list[Task] = []
    names = [f"{name}.json" for name in RELEASED]
    paths = find_annotation_files(files.annotations, names)
    for file in paths:
        if file.name not in names:
            raise UserError(f"{file}: TempCompass's files are {', '.join(names)}")
        tasks += [_task(question, file.stem, files) for question in _questions(file)]
    released = sum(RELEASED[file.stem] for file in paths)
    return Benchmark("TempCompass", tuple(tasks), compute_metrics, score_answer, num_released=released)


def read_captions(files: BenchmarkFiles) -> Benchmark:
    """Read `captioning.json`, and the judge's questions from `multi-choice.json` in the same folder."""
    file = find_annotation_file(files.annotations, "captioning.json")
    choices = {(q.video, q.aspect): q for q in _questions(file.parent / f"{CHOICE}.json") if q.index == 0}
    tasks = []
    for caption in _questions(file):
        choice = choices.get((caption.video, caption.aspect))
        if choice is None:
            raise UserError(f"{caption.record.location}: {CHOICE}.json has no question about this video and aspect")
        question = choice.record.text("question")
        letter = _task(choice, CHOICE, files).answer
        task = _task(caption, CAPTIONING, files)
        tasks.append(
            replace(
                task,
                answer_type=AnswerType.CAPTION,
                caption_questions=(CaptionQuestion(question, letter, AnswerType.MULTIPLE_CHOICE),),
            )
        )
    compute_metrics = accuracy_metrics(Breakdown("aspect", extra_label("aspect"), ASPECTS))
    return Benchmark("TempCompass captions", tuple(tasks), compute_metrics, num_released=CAPTIONS_RELEASED)


@dataclass(frozen=True, slots=True)
class _Question:
    """A question's record and its position in the file."""

    video: str
    aspect: str
    index: int
    record: AnnotationRecord


def _questions(file: Path) -> Iterator[_Question]:
    """Yield every question of a file."""
    values = read_annotation_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected an object of videos, got {type(values).__name__}")
    for video, aspects in values.items():
        if not isinstance(aspects, dict) or not set(aspects) <= set(ASPECTS):
            raise UserError(f"{file}, video {video}: expected questions by aspect ({', '.join(ASPECTS)})")
        for aspect, questions in aspects.items():
            location = f"{file}, video {video}, {aspect}"
            if not isinstance(questions, list):
                raise UserError(f"{location}: expected a list of questions, got {type(questions).__name__}")
            for index, question in enumerate(questions):
                record = SCHEMA.check(question, f"{location}, question {index}")
                yield _Question(video, aspect, index, record)


def _task(question: _Question, kind: str, files: BenchmarkFiles) -> Task:
    text = question.record.text("question")
    answer, extra = _reference(question.record, kind, text)
    return Task(
        task_id=f"{kind}/{question.video}/{question.aspect}/{question.index}",
        video=files.videos.find(question.video),
        question=text,
        answer=answer,
        source="TempCompass",
        kind=kind,
        extra={"aspect": question.aspect, **extra},
    )


def _reference(record: AnnotationRecord, kind: str, question: str) -> tuple[str, dict[str, object]]:
    """Return the reference answer (a letter, yes or no, a caption), and the options of a caption question."""
    if kind == CAPTIONING:
        return record.text("answer"), {}
    answer = record.text("answer").strip()
    if kind == YES_NO:
        return record.one_of("answer", ("yes", "no")), {}
    if kind == CHOICE:
        if answer not in [line.strip() for line in question.split("\n")] or answer[:1] not in LETTERS:
            raise record.field_error("answer", "one of the question's options, such as 'A. left'")
        return answer[0], {}
    captions = [f"{label}: {text}" for label, text in _LABELED_CAPTION.findall(question)]
    if answer not in captions:
        raise record.field_error("answer", "one of the question's captions, such as 'Option 1: ...'")
    options = dict(zip(LETTERS, captions, strict=False))
    return LETTERS[captions.index(answer)], {"options": options}
