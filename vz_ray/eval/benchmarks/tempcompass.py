"""TempCompass: multiple choice, yes or no, caption matching and captioning, by temporal aspect.

Source of the metric: accuracy of each task overall and by aspect; `average` is the
mean of the first three tasks. A caption is correct if a judge, given the caption
only, answers the first choice question about the same video and aspect correctly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vz_ray.env.task import AnswerType, CaptionQuestion, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
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
from vz_ray.eval.benchmarks.video_folder import VideoFolder
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
    root, videos, tasks = files.annotations, VideoFolder(files.video_dir), list[Task]()
    paths = [root] if root.is_file() else [find_annotation_file(root, f"{name}.json") for name in RELEASED]
    for file in paths:
        if file.stem not in RELEASED:
            raise UserError(f"{file}: TempCompass's files are {', '.join(f'{name}.json' for name in RELEASED)}")
        tasks += _tasks(file, videos)
    released = sum(RELEASED[file.stem] for file in paths)
    return Benchmark("TempCompass", tuple(tasks), compute_metrics, score_answer, num_released=released)


def compute_caption_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return the accuracy of captions overall and by aspect."""
    return [accuracy_metric(scores), *accuracy_table(scores, "aspect", extra_label("aspect"), ASPECTS)]


def read_captions(files: BenchmarkFiles) -> Benchmark:
    """Read `captioning.json`, and the judge's questions from `multi-choice.json` in the same folder."""
    root, videos = files.annotations, VideoFolder(files.video_dir)
    file = find_annotation_file(root, "captioning.json")
    choices = {
        (video, aspect): record
        for video, aspect, index, record in _questions(file.parent / f"{CHOICE}.json")
        if index == 0
    }
    tasks = []
    for video, aspect, index, record in _questions(file):
        if (video, aspect) not in choices:
            raise UserError(f"{record.location}: {CHOICE}.json has no question about this video and aspect")
        choice = choices[video, aspect]
        question = choice.text("question")
        letter, _ = _reference(choice, CHOICE, question)
        tasks.append(
            Task(
                task_id=f"{CAPTIONING}/{video}/{aspect}/{index}",
                video=videos.find(video),
                question=record.text("question"),
                answer=record.text("answer"),
                answer_type=AnswerType.CAPTION,
                source="TempCompass",
                kind=CAPTIONING,
                extra={"aspect": aspect},
                caption_questions=(CaptionQuestion(question, letter, AnswerType.MULTIPLE_CHOICE),),
            )
        )
    return Benchmark("TempCompass captions", tuple(tasks), compute_caption_metrics, num_released=CAPTIONS_RELEASED)


def _tasks(file: Path, videos: VideoFolder) -> Iterator[Task]:
    for video, aspect, index, record in _questions(file):
        yield _task(record, file.stem, video, aspect, index, videos)


def _questions(file: Path) -> Iterator[tuple[str, str, int, AnnotationRecord]]:
    """Yield video, aspect, index and record of every question of a file."""
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
                yield video, aspect, index, SCHEMA.check(question, f"{location}, question {index}")


def _task(record: AnnotationRecord, kind: str, video: str, aspect: str, index: int, videos: VideoFolder) -> Task:
    question = record.text("question")
    answer, extra = _reference(record, kind, question)
    return Task(
        task_id=f"{kind}/{video}/{aspect}/{index}",
        video=videos.find(video),
        question=question,
        answer=answer,
        source="TempCompass",
        kind=kind,
        extra={"aspect": aspect, **extra},
    )


def _reference(record: AnnotationRecord, kind: str, question: str) -> tuple[str, dict[str, object]]:
    """Return the reference answer (a letter, yes or no), and the options of a caption question."""
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
