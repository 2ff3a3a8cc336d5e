"""CLEVRER: words for descriptive questions; elsewhere each option is right or wrong by itself.

Source of the metric: descriptive answers by exact match; the other types per
option, and per question, for which all of its options must be right. Such a
question is asked once, for the letters of all its right options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vz_ray.data.task import Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source, ask, lettered
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, accuracy, by, kind
from vz_ray.evaluate.benchmarks.files import Record, Schema, find_file, read_records
from vz_ray.evaluate.benchmarks.marks import UNPARSED, Mark, Reading, mark_words, options_in
from vz_ray.evaluate.benchmarks.videos import VideoFolder
from vz_ray.reward.span import bare, folded

SCENES = Schema("CLEVRER's validation.json", ("scene_index", "video_filename", "questions"))
DESCRIPTIVE = Schema(
    "CLEVRER's descriptive questions", ("question_id", "question", "question_type", "program", "answer"),
    {"choices": "a question with options, which is not descriptive"},
    {"answer": "test.json, whose answers are not public; use validation.json"},
)  # fmt: skip
CHOICES = Schema(
    "CLEVRER's questions with options", ("question_id", "question", "question_type", "program", "choices")
)
OPTION = Schema(
    "CLEVRER's options",
    ("choice_id", "choice", "answer"),
    lacks={"answer": "test.json, whose answers are not public; use validation.json"},
)
TYPES = ("descriptive", "explanatory", "predictive", "counterfactual")
ALL = "Several of these may be right, or none. Answer with the letters of all that are, or with none."
NONE = "none"
RIGHT = "options_right"

_NOTHING = frozenset({"none", "none of them", "none of these", "none of the above", "no option", "nothing"})


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """All questions, and per type by question and by option."""
    questions = [accuracy(members, name, "by question") for name, members in by(samples, kind, TYPES).items()]
    options = [_per_option(members, name) for name, members in by(samples, kind, TYPES).items()]
    return [
        accuracy(samples, "by question"),
        *questions,
        *(figure for figure in options if figure.count),
    ]


def _per_option(samples: Sequence[Scored], name: str) -> Figure:
    """Options rightly named or left out; of an answer that cannot be read, none is."""
    right = sum(sample.detail.get(RIGHT, 0.0) for sample in samples)
    count = sum(len(options_in(sample.task)) for sample in samples if "options" in sample.task.extra)
    return Figure(name, right / count if count else None, count, "by option")


def mark(task: Task, text: str) -> Mark:
    """Words, or a set of letters; each option that is rightly named or rightly left out is right."""
    options = task.extra.get("options")
    if not isinstance(options, dict):
        return mark_words(task, text)
    named = letters_in(text, options)
    if named is None:
        return UNPARSED
    truth = letters_in(task.answer, options)
    assert truth is not None
    right = sum((letter in named) == (letter in truth) for letter in options)
    return Mark(Reading.READ, float(right == len(options)), _written(named), {RIGHT: float(right)})


def letters_in(text: str, options: dict[str, str]) -> frozenset[str] | None:
    """The letters that a text names, none of them for `none`; None if it says anything else.

    Example: `A, C`, `(A) and (C)`, `none`
    """
    said = bare(text)
    if folded(said) in _NOTHING:
        return frozenset()
    parts = (part.strip("().:").upper() for part in re.split(r"[,;/&\s]+|\band\b", said))
    named = frozenset(part for part in parts if part)
    return named if named and named <= set(options) else None


def read(source: Source) -> Benchmark:
    """Reads `validation.json`; videos are searched below the folder."""
    videos, tasks = VideoFolder(source.videos), list[Task]()
    for scene in read_records(find_file(source.annotations, "validation.json"), SCENES):
        tasks += _tasks(scene, videos)
    return Benchmark("CLEVRER", tuple(tasks), figures, mark=mark)


def _tasks(scene: Record, videos: VideoFolder) -> Iterator[Task]:
    video = videos.find(scene.text("video_filename"))
    for index, values in enumerate(scene.items("questions")):
        place = f"{scene.place}, question {index}"
        descriptive = isinstance(values, dict) and values.get("question_type") == TYPES[0]
        asked = (DESCRIPTIVE if descriptive else CHOICES).check(values, place)
        kind_of = asked.one_of("question_type", TYPES)
        name = f"{scene.whole('scene_index')}/{asked.whole('question_id')}"
        text = asked.text("question")
        if descriptive:
            yield Task(name, video, text, asked.label("answer"), source="CLEVRER", kind=kind_of)
            continue
        choices = enumerate(asked.items("choices"))
        options = [OPTION.check(item, f"{place}, choice {i}") for i, item in choices]
        texts = lettered([option.text("choice") for option in options])
        right = [option.one_of("answer", ("correct", "wrong")) == "correct" for option in options]
        truth = {letter for letter, good in zip(texts, right, strict=True) if good}
        question = f"{ask(text, texts)}\n{ALL}"
        yield Task(
            name, video, question, _written(truth), source="CLEVRER", kind=kind_of, extra={"options": texts}
        )


def _written(letters: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(letters)) or NONE
