"""MLVU: the dev set in both layouts, its open-ended tasks, and the test set.

Source of the metric: M-Avg is the mean over the choice tasks, each counting
the same. The VideoZoomer paper's figures are micro averages; both are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vz_ray.data.task import AnswerType, Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source, ask, lettered
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, accuracy, kind, macro, table_of
from vz_ray.evaluate.benchmarks.files import Record, Schema, find_file, first_record, read_json, read_records
from vz_ray.evaluate.benchmarks.videos import VideoFolder
from vz_ray.observe.errors import UserError
from vz_ray.reward import options_of, parse_choice

DEV = Schema(
    "MLVU dev",
    ("video", "duration", "question", "candidates", "answer", "question_type"),
    {
        "video_name": "the layout with letters, which may not be mixed with this one",
        "question_id": "MLVU test (use the benchmark mlvu_test)",
    },
)
TEST = Schema(
    "MLVU test",
    ("video", "question", "candidates", "question_type", "question_id"),
    {"answer": "MLVU dev (use the benchmark mlvu_dev)"},
)
LETTERED = Schema(
    "MLVU (layout with letters)",
    ("video_name", "question", "answer", "task_type", "question_id"),
    {"video": "the layout with texts, which may not be mixed with this one"},
)
OPEN = Schema("MLVU dev, open-ended", ("video", "duration", "question", "answer", "question_type"))

CHOICE_TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
OPEN_TASKS = ("sub_scene", "summary")
CHOICE_FILES = tuple(f"{number}_{name}.json" for number, name in enumerate(CHOICE_TASKS, start=1))
OPEN_FILES = tuple(f"{number}_{name}.json" for number, name in enumerate(OPEN_TASKS, start=8))
DEV_RELEASED, OPEN_RELEASED, TEST_RELEASED = 2174, 418, 502
OTHER_NAMES = {"findNeedle": "needle", "subPlot": "sub_scene"}
"""Tasks that records call otherwise than their files."""


def choice_figures(samples: Sequence[Scored]) -> list[Figure]:
    """M-Avg, micro average, and each task."""
    tasks = table_of(samples, "task", kind, CHOICE_TASKS)
    return [macro(tasks, "M-Avg"), accuracy(samples, "micro"), *tasks]


def open_figures(samples: Sequence[Scored]) -> list[Figure]:
    """Share that the judge found right, and each task."""
    return [accuracy(samples), *table_of(samples, "task", kind, OPEN_TASKS)]


def read_dev(source: Source) -> Benchmark:
    """The seven choice tasks of the dev set: a folder of files, or one file in either layout."""
    videos, tasks = VideoFolder(source.videos), list[Task]()
    for file in _files(source.annotations, CHOICE_FILES):
        if _is_lettered(file):
            tasks += [_lettered(record, "MLVU dev", videos) for record in read_records(file, LETTERED)]
        else:
            records = enumerate(read_records(file, DEV))
            tasks += [_dev_task(record, file, index, videos) for index, record in records]
    return Benchmark("MLVU dev", tuple(tasks), choice_figures, released=DEV_RELEASED)


def read_open(source: Source) -> Benchmark:
    """The two open-ended tasks of the dev set; a judge says what is right."""
    videos, tasks = VideoFolder(source.videos), list[Task]()
    for file in _files(source.annotations, OPEN_FILES):
        for index, record in enumerate(read_records(file, OPEN)):
            tasks.append(
                Task(
                    task_id=f"{file.stem}/{index}",
                    video=videos.find(f"{file.stem}/{record.text('video')}"),
                    question=record.text("question"),
                    answer=record.text("answer"),
                    answer_type=AnswerType.OPEN_ENDED,
                    source="MLVU dev",
                    kind=_kind(record.text("question_type")),
                )
            )
    return Benchmark("MLVU dev, open-ended", tuple(tasks), open_figures, released=OPEN_RELEASED)


def read_test(source: Source) -> Benchmark:
    """The test set; its answers are in a file of their own, except in the layout with letters."""
    file = find_file(source.annotations, "test_question.json")
    videos = VideoFolder(source.videos)
    if _is_lettered(file):
        tasks = [_lettered(record, "MLVU test", videos) for record in read_records(file, LETTERED)]
    elif source.answers is None:
        raise UserError(
            f"{file} has questions alone: set `answers` to the file with MLVU test's ground truth"
        )
    else:
        truths, records = _truths(source.answers), read_records(file, TEST)
        tasks = [_test_task(record, truths, source.answers, videos) for record in records]
    return Benchmark("MLVU test", tuple(tasks), choice_figures, released=TEST_RELEASED)


def _files(root: Path, names: Iterable[str]) -> list[Path]:
    """The files of a folder, all of them; a file alone is all there is."""
    return [root] if root.is_file() else [find_file(root, name) for name in names]


def _is_lettered(file: Path) -> bool:
    """Which layout a file has, by its first record."""
    return "video_name" in first_record(file)


def _kind(name: str) -> str:
    """A task's name as its file has it, unnumbered: `1_plotQA` is `plotQA`, `findNeedle` is `needle`."""
    bare = name.split("_", 1)[1] if name[:1].isdigit() and "_" in name else name
    return OTHER_NAMES.get(bare, bare)


def _dev_task(record: Record, file: Path, index: int, videos: VideoFolder) -> Task:
    record.number("duration")
    options = lettered(record.options("candidates"))
    return Task(
        task_id=f"{file.stem}/{index}",
        # Videos of each task are in a folder of their own, named as the file.
        video=videos.find(f"{file.stem}/{record.text('video')}"),
        question=ask(record.text("question"), options),
        answer=_letter_of_text(record, options),
        source="MLVU dev",
        kind=_kind(record.text("question_type")),
        extra={"options": options},
    )


def _lettered(record: Record, name: str, videos: VideoFolder) -> Task:
    """A record whose answer is a letter, `B` or `(B)`, and whose question most often holds the options."""
    question = record.text("question")
    options = options_of(question)
    if not options:
        options = lettered(record.options("candidates"))
        question = ask(question, options)
    answer = parse_choice(record.text("answer"), options)
    if answer not in options:
        raise record.fault("answer", f"a letter from A to {max(options)}")
    return Task(
        task_id=f"{_kind(record.text('task_type'))}/{record.label('question_id')}",
        video=videos.find(record.text("video_name")),
        question=question,
        answer=answer,
        source=name,
        kind=_kind(record.text("task_type")),
        extra={"options": options},
    )


def _letter_of_text(record: Record, options: dict[str, str]) -> str:
    """The letter of the option whose text is the answer."""
    value = record.values.get("answer")
    answer = str(value).strip() if isinstance(value, int | float) else record.text("answer").strip()
    found = [letter for letter, option in options.items() if option == answer]
    if not found:
        raise record.fault("answer", f"the text of one of {', '.join(map(repr, options.values()))}")
    return found[0]


def _truths(file: Path) -> dict[str, str]:
    """Answers by question id: a list of records, or an object."""
    values = read_json(file)
    if isinstance(values, dict):
        return {str(key): str(value) for key, value in values.items()}
    schema = Schema("MLVU test's ground truth", ("question_id", "answer"))
    return {record.label("question_id"): record.label("answer") for record in read_records(file, schema)}


def _test_task(record: Record, truths: dict[str, str], file: Path, videos: VideoFolder) -> Task:
    options, name = lettered(record.options("candidates")), record.label("question_id")
    if name not in truths:
        raise UserError(f"{file} has no answer to question {name} ({record.place})")
    answer = parse_choice(truths[name], options)
    if answer is None:
        raise UserError(
            f"{file}: the answer to question {name} is {truths[name]!r}; expected a letter from A to "
            f"{max(options)} or the text of one of {', '.join(map(repr, options.values()))}"
        )
    return Task(
        task_id=name,
        video=videos.find(record.text("video")),
        question=ask(record.text("question"), options),
        answer=answer,
        source="MLVU test",
        kind=_kind(record.text("question_type")),
        extra={"options": options},
    )
