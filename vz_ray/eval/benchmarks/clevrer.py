"""CLEVRER: descriptive questions with one-word answers, and questions with several correct options.

Source of the metric: exact match for descriptive questions; for the other types
accuracy per option, and per question, which is correct if all its options are.
Here such a question asks once for the letters of all correct options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
    accuracy_table,
    group_by,
    kind_label,
)
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema
from vz_ray.eval.benchmarks.answer_scoring import (
    UNPARSED_SCORE,
    AnswerScore,
    AnswerStatus,
    score_words,
    task_options,
)
from vz_ray.eval.benchmarks.benchmark import BenchmarkFiles, RecordAdapter, format_question, letter_options
from vz_ray.rewards.answer_text import normalize_text, strip_wrapping

SCENES = AnnotationSchema("CLEVRER's validation.json", ("scene_index", "video_filename", "questions"))
DESCRIPTIVE = AnnotationSchema(
    "CLEVRER's descriptive questions", ("question_id", "question", "question_type", "program", "answer"),
    {"choices": "a question with options, which is not descriptive"},
    {"answer": "test.json, without public answers; use validation.json"},
)  # fmt: skip
CHOICES = AnnotationSchema(
    "CLEVRER's questions with options", ("question_id", "question", "question_type", "program", "choices")
)
OPTION = AnnotationSchema(
    "CLEVRER's options",
    ("choice_id", "choice", "answer"),
    other_version_omits={"answer": "test.json, without public answers; use validation.json"},
)
TYPES = ("descriptive", "explanatory", "predictive", "counterfactual")
ALL = "Several of these may be right, or none. Answer with the letters of all that are, or with none."
NONE = "none"
CORRECT_OPTIONS = "correct_options"

_NONE_ANSWERS = frozenset({"none", "none of them", "none of these", "none of the above", "no option", "nothing"})


def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return the accuracy by question overall, then by question and by option for each type."""
    options = [_per_option(members, name) for name, members in group_by(scores, kind_label, TYPES).items()]
    return [
        accuracy_metric(scores, "by question"),
        *accuracy_table(scores, "by question", kind_label, TYPES),
        *(metric for metric in options if metric.count),
    ]


def _per_option(scores: Sequence[TaskScore], name: str) -> BenchmarkMetric:
    """Return the fraction of correctly classified options; an unparsed answer has none."""
    correct = sum(score.detail.get(CORRECT_OPTIONS, 0.0) for score in scores)
    count = sum(len(task_options(score.task)) for score in scores if "options" in score.task.extra)
    return BenchmarkMetric(name, correct / count if count else None, count, "by option")


def score_answer(task: Task, text: str) -> AnswerScore:
    """Score words by exact match, and a set of letters by option: named if correct, omitted if wrong."""
    options = task.extra.get("options")
    if not isinstance(options, dict):
        return score_words(task, text)
    letters = parse_letters(text, options)
    if letters is None:
        return UNPARSED_SCORE
    reference = parse_letters(task.answer, options)
    assert reference is not None
    correct = sum((letter in letters) == (letter in reference) for letter in options)
    return AnswerScore(
        AnswerStatus.PARSED,
        float(correct == len(options)),
        _format_letters(letters),
        {CORRECT_OPTIONS: float(correct)},
    )


def parse_letters(text: str, options: dict[str, str]) -> frozenset[str] | None:
    """Parse a set of letters; `none` is the empty set. Return None if the text has anything else.

    Example: `A, C`, `(A) and (C)`, `none`
    """
    answer = strip_wrapping(text)
    if normalize_text(answer) in _NONE_ANSWERS:
        return frozenset()
    parts = (part.strip("().:").upper() for part in re.split(r"[,;/&\s]+|\band\b", answer))
    letters = frozenset(part for part in parts if part)
    return letters if letters and letters <= set(options) else None


def read_scene(scene: AnnotationRecord, files: BenchmarkFiles) -> Iterator[Task]:
    video = files.videos.find(scene.text("video_filename"))
    for index, values in enumerate(scene.items("questions")):
        location = f"{scene.location}, question {index}"
        descriptive = isinstance(values, dict) and values.get("question_type") == TYPES[0]
        record = (DESCRIPTIVE if descriptive else CHOICES).check(values, location)
        kind = record.one_of("question_type", TYPES)
        task_id = f"{scene.integer('scene_index')}/{record.integer('question_id')}"
        text = record.text("question")
        if descriptive:
            yield Task(task_id, video, text, record.label("answer"), kind=kind)
            continue
        choices = enumerate(record.items("choices"))
        options = [OPTION.check(item, f"{location}, choice {i}") for i, item in choices]
        texts = letter_options([option.text("choice") for option in options])
        correct = {
            letter
            for letter, option in zip(texts, options, strict=True)
            if option.one_of("answer", ("correct", "wrong")) == "correct"
        }
        yield Task(
            task_id,
            video,
            f"{format_question(text, texts)}\n{ALL}",
            _format_letters(correct),
            kind=kind,
            extra={"options": texts},
        )


def _format_letters(letters: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(letters)) or NONE


ADAPTER = RecordAdapter(
    title="CLEVRER",
    file_names=("validation.json",),
    schema=SCENES,
    read_record=read_scene,
    compute_metrics=compute_metrics,
    score_answer=score_answer,
)
