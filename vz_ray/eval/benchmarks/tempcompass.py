"""TempCompass: multiple choice, yes or no, caption matching, and captioning, by temporal aspect.

Source of the metric: accuracy of each task over its questions, and by aspect;
`average` is the mean of the first three tasks. A caption is right if a judge
who reads it alone finds the answer to the first choice question about the same
video and aspect.
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

_LABELLED = re.compile(r"^((?:Option|Sentence|Caption) [A-Z0-9]): (.+)$", re.MULTILINE)
_YES_NO = re.compile(r"(yes|no)\b")


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Mean of the tasks, each task, and each aspect within its task."""
    tasks = accuracy_table(samples, "task", kind_label, tuple(RELEASED))
    found = [macro_average(tasks, "average"), accuracy_metric(samples, "micro"), *tasks]
    for task, members in group_by(samples, kind_label, tuple(RELEASED)).items():
        found += accuracy_table(members, f"{task}, by aspect", extra_label("aspect"), ASPECTS)
    return found


def score_answer(task: Task, text: str) -> AnswerScore:
    """As the task asks: an option, yes or no, or which of two captions."""
    if task.kind == CHOICE:
        return score_choice(task, text)
    said = normalize_text(strip_wrapping(text))
    if task.kind == YES_NO:
        match = _YES_NO.match(said)
        return (
            AnswerScore(AnswerStatus.PARSED, float(match[1] == task.answer), match[1])
            if match
            else UNPARSED_SCORE
        )
    letter = _caption(task, said)
    return (
        AnswerScore(AnswerStatus.PARSED, float(letter == task.answer), letter) if letter else UNPARSED_SCORE
    )


def _caption(task: Task, said: str) -> str | None:
    """The letter of the caption that is named by its label (`Option 2`, `2`), its text, or both."""
    found = set()
    for letter, caption in task_options(task).items():
        label, text = (normalize_text(part) for part in caption.split(": ", 1))
        names = (label, label.split()[-1])
        if said in (*names, text) or said.startswith(tuple(f"{name}:" for name in names)):
            found.add(letter)
    return found.pop() if len(found) == 1 else None


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads the question files of the three tasks in a folder, or one of them."""
    root, videos, tasks = source.annotations, VideoFolder(source.video_dir), list[Task]()
    files = [root] if root.is_file() else [find_annotation_file(root, f"{name}.json") for name in RELEASED]
    for file in files:
        if file.stem not in RELEASED:
            raise UserError(
                f"{file}: TempCompass's files are {', '.join(f'{name}.json' for name in RELEASED)}"
            )
        tasks += _tasks(file, videos)
    released = sum(RELEASED[file.stem] for file in files)
    return Benchmark("TempCompass", tuple(tasks), compute_metrics, score_answer, num_released=released)


def compute_caption_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Accuracy of all captions, and by aspect."""
    return [accuracy_metric(samples), *accuracy_table(samples, "aspect", extra_label("aspect"), ASPECTS)]


def read_captions(source: BenchmarkFiles) -> Benchmark:
    """Reads `captioning.json`, and beside it `multi-choice.json`, whose questions captions are judged by."""
    root, videos = source.annotations, VideoFolder(source.video_dir)
    file = find_annotation_file(root, "captioning.json")
    choices = {
        (video, aspect): (record, place)
        for video, aspect, index, record, place in _questions(file.parent / f"{CHOICE}.json")
        if index == 0
    }
    tasks = []
    for video, aspect, index, record, place in _questions(file):
        if (video, aspect) not in choices:
            raise UserError(f"{place}: {CHOICE}.json has no question about that video and aspect")
        choice, _ = choices[video, aspect]
        question = choice.text("question")
        letter, _ = _truth(choice, CHOICE, question)
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
    return Benchmark(
        "TempCompass captions", tuple(tasks), compute_caption_metrics, num_released=CAPTIONS_RELEASED
    )


def _tasks(file: Path, videos: VideoFolder) -> Iterator[Task]:
    for video, aspect, index, record, _ in _questions(file):
        yield _task(record, file.stem, video, aspect, index, videos)


def _questions(file: Path) -> Iterator[tuple[str, str, int, AnnotationRecord, str]]:
    """Video, aspect and number of every question of a file, its record, and where that stands."""
    values = read_annotation_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected an object of videos, found {type(values).__name__}")
    for video, aspects in values.items():
        if not isinstance(aspects, dict) or not set(aspects) <= set(ASPECTS):
            raise UserError(f"{file}, video {video}: expected questions by aspect ({', '.join(ASPECTS)})")
        for aspect, questions in aspects.items():
            place = f"{file}, video {video}, {aspect}"
            if not isinstance(questions, list):
                raise UserError(f"{place}: expected a list of questions, found {type(questions).__name__}")
            for index, question in enumerate(questions):
                where = f"{place}, question {index}"
                yield video, aspect, index, SCHEMA.check(question, where), where


def _task(
    record: AnnotationRecord, kind_of: str, video: str, aspect: str, index: int, videos: VideoFolder
) -> Task:
    question = record.text("question")
    answer, more = _truth(record, kind_of, question)
    return Task(
        task_id=f"{kind_of}/{video}/{aspect}/{index}",
        video=videos.find(video),
        question=question,
        answer=answer,
        source="TempCompass",
        kind=kind_of,
        extra={"aspect": aspect, **more},
    )


def _truth(record: AnnotationRecord, kind_of: str, question: str) -> tuple[str, dict[str, object]]:
    """The answer as a letter, or yes or no; and options that have no letters of their own."""
    answer = record.text("answer").strip()
    if kind_of == YES_NO:
        return record.one_of("answer", ("yes", "no")), {}
    if kind_of == CHOICE:
        if answer not in [line.strip() for line in question.split("\n")] or answer[:1] not in LETTERS:
            raise record.field_error("answer", "one of the question's options, such as 'A. left'")
        return answer[0], {}
    captions = [f"{label}: {text}" for label, text in _LABELLED.findall(question)]
    if answer not in captions:
        raise record.field_error("answer", "one of the question's captions, such as 'Option 1: ...'")
    options = dict(zip(LETTERS, captions, strict=False))
    return LETTERS[captions.index(answer)], {"options": options}
