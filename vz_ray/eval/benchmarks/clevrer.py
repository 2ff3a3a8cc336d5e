"""CLEVRER: words for descriptive questions; elsewhere each option is right or wrong by itself.

Source of the metric: descriptive answers by exact match; the other types per
option, and per question, for which all of its options must be right. Such a
question is asked once, for the letters of all its right options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
    group_by,
    kind_label,
)
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    read_annotations,
)
from vz_ray.eval.benchmarks.answer_scoring import (
    UNPARSED_SCORE,
    AnswerScore,
    AnswerStatus,
    score_words,
    task_options,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, format_question, letter_options
from vz_ray.eval.benchmarks.video_folder import VideoFolder
from vz_ray.rewards.answer_text import normalize_text, strip_wrapping

SCENES = AnnotationSchema("CLEVRER's validation.json", ("scene_index", "video_filename", "questions"))
DESCRIPTIVE = AnnotationSchema(
    "CLEVRER's descriptive questions", ("question_id", "question", "question_type", "program", "answer"),
    {"choices": "a question with options, which is not descriptive"},
    {"answer": "test.json, whose answers are not public; use validation.json"},
)  # fmt: skip
CHOICES = AnnotationSchema(
    "CLEVRER's questions with options", ("question_id", "question", "question_type", "program", "choices")
)
OPTION = AnnotationSchema(
    "CLEVRER's options",
    ("choice_id", "choice", "answer"),
    other_version_omits={"answer": "test.json, whose answers are not public; use validation.json"},
)
TYPES = ("descriptive", "explanatory", "predictive", "counterfactual")
ALL = "Several of these may be right, or none. Answer with the letters of all that are, or with none."
NONE = "none"
RIGHT = "options_right"

_NOTHING = frozenset({"none", "none of them", "none of these", "none of the above", "no option", "nothing"})


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """All questions, and per type by question and by option."""
    questions = [
        accuracy_metric(members, name, "by question")
        for name, members in group_by(samples, kind_label, TYPES).items()
    ]
    options = [_per_option(members, name) for name, members in group_by(samples, kind_label, TYPES).items()]
    return [
        accuracy_metric(samples, "by question"),
        *questions,
        *(figure for figure in options if figure.count),
    ]


def _per_option(samples: Sequence[TaskScore], name: str) -> BenchmarkMetric:
    """Options rightly named or left out; of an answer that cannot be read, none is."""
    right = sum(sample.detail.get(RIGHT, 0.0) for sample in samples)
    count = sum(len(task_options(sample.task)) for sample in samples if "options" in sample.task.extra)
    return BenchmarkMetric(name, right / count if count else None, count, "by option")


def score_answer(task: Task, text: str) -> AnswerScore:
    """Words, or a set of letters; each option that is rightly named or rightly left out is right."""
    options = task.extra.get("options")
    if not isinstance(options, dict):
        return score_words(task, text)
    named = parse_letters(text, options)
    if named is None:
        return UNPARSED_SCORE
    truth = parse_letters(task.answer, options)
    assert truth is not None
    right = sum((letter in named) == (letter in truth) for letter in options)
    return AnswerScore(
        AnswerStatus.PARSED, float(right == len(options)), _written(named), {RIGHT: float(right)}
    )


def parse_letters(text: str, options: dict[str, str]) -> frozenset[str] | None:
    """The letters that a text names, none of them for `none`; None if it says anything else.

    Example: `A, C`, `(A) and (C)`, `none`
    """
    said = strip_wrapping(text)
    if normalize_text(said) in _NOTHING:
        return frozenset()
    parts = (part.strip("().:").upper() for part in re.split(r"[,;/&\s]+|\band\b", said))
    named = frozenset(part for part in parts if part)
    return named if named and named <= set(options) else None


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads `validation.json`; videos are searched below the folder."""
    videos, tasks = VideoFolder(source.video_dir), list[Task]()
    for scene in read_annotations(find_annotation_file(source.annotations, "validation.json"), SCENES):
        tasks += _tasks(scene, videos)
    return Benchmark("CLEVRER", tuple(tasks), compute_metrics, score_answer=score_answer)


def _tasks(scene: AnnotationRecord, videos: VideoFolder) -> Iterator[Task]:
    video = videos.find(scene.text("video_filename"))
    for index, values in enumerate(scene.items("questions")):
        place = f"{scene.location}, question {index}"
        descriptive = isinstance(values, dict) and values.get("question_type") == TYPES[0]
        asked = (DESCRIPTIVE if descriptive else CHOICES).check(values, place)
        kind_of = asked.one_of("question_type", TYPES)
        name = f"{scene.integer('scene_index')}/{asked.integer('question_id')}"
        text = asked.text("question")
        if descriptive:
            yield Task(name, video, text, asked.label("answer"), source="CLEVRER", kind=kind_of)
            continue
        choices = enumerate(asked.items("choices"))
        options = [OPTION.check(item, f"{place}, choice {i}") for i, item in choices]
        texts = letter_options([option.text("choice") for option in options])
        right = [option.one_of("answer", ("correct", "wrong")) == "correct" for option in options]
        truth = {letter for letter, good in zip(texts, right, strict=True) if good}
        question = f"{format_question(text, texts)}\n{ALL}"
        yield Task(
            name, video, question, _written(truth), source="CLEVRER", kind=kind_of, extra={"options": texts}
        )


def _written(letters: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(letters)) or NONE
