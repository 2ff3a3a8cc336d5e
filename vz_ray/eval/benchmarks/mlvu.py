"""MLVU: the dev set in both layouts, its open-ended tasks, and the test set.

Source of the metric: M-Avg is the mean over the choice tasks, each counting
the same. The VideoZoomer paper's figures are micro averages; both are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
    accuracy_table,
    kind_label,
    macro_average,
)
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    read_annotation_json,
    read_annotations,
    read_first_record,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, format_question, letter_options
from vz_ray.eval.benchmarks.video_folder import VideoFolder
from vz_ray.rewards import parse_choice, parse_options
from vz_ray.utils.errors import UserError

DEV = AnnotationSchema(
    "MLVU dev",
    ("video", "duration", "question", "candidates", "answer", "question_type"),
    {
        "video_name": "the layout with letters, which may not be mixed with this one",
        "question_id": "MLVU test (use the benchmark mlvu_test)",
    },
)
TEST = AnnotationSchema(
    "MLVU test",
    ("video", "question", "candidates", "question_type", "question_id"),
    {"answer": "MLVU dev (use the benchmark mlvu_dev)"},
)
LETTERED = AnnotationSchema(
    "MLVU (layout with letters)",
    ("video_name", "question", "answer", "task_type", "question_id"),
    {"video": "the layout with texts, which may not be mixed with this one"},
)
OPEN = AnnotationSchema("MLVU dev, open-ended", ("video", "duration", "question", "answer", "question_type"))

CHOICE_TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
OPEN_TASKS = ("sub_scene", "summary")
CHOICE_FILES = tuple(f"{number}_{name}.json" for number, name in enumerate(CHOICE_TASKS, start=1))
OPEN_FILES = tuple(f"{number}_{name}.json" for number, name in enumerate(OPEN_TASKS, start=8))
DEV_RELEASED, OPEN_RELEASED, TEST_RELEASED = 2174, 418, 502
OTHER_NAMES = {"findNeedle": "needle", "subPlot": "sub_scene"}
"""Tasks that records call otherwise than their files."""


def compute_choice_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """M-Avg, micro average, and each task."""
    tasks = accuracy_table(samples, "task", kind_label, CHOICE_TASKS)
    return [macro_average(tasks, "M-Avg"), accuracy_metric(samples, "micro"), *tasks]


def compute_open_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Share that the judge found right, and each task."""
    return [accuracy_metric(samples), *accuracy_table(samples, "task", kind_label, OPEN_TASKS)]


def read_dev(source: BenchmarkFiles) -> Benchmark:
    """The seven choice tasks of the dev set: a folder of files, or one file in either layout."""
    videos, tasks = VideoFolder(source.video_dir), list[Task]()
    for file in _files(source.annotations, CHOICE_FILES):
        if _is_lettered(file):
            tasks += [_lettered(record, "MLVU dev", videos) for record in read_annotations(file, LETTERED)]
        else:
            records = enumerate(read_annotations(file, DEV))
            tasks += [_dev_task(record, file, index, videos) for index, record in records]
    return Benchmark("MLVU dev", tuple(tasks), compute_choice_metrics, num_released=DEV_RELEASED)


def read_open(source: BenchmarkFiles) -> Benchmark:
    """The two open-ended tasks of the dev set; a judge says what is right."""
    videos, tasks = VideoFolder(source.video_dir), list[Task]()
    for file in _files(source.annotations, OPEN_FILES):
        for index, record in enumerate(read_annotations(file, OPEN)):
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
    return Benchmark("MLVU dev, open-ended", tuple(tasks), compute_open_metrics, num_released=OPEN_RELEASED)


def read_test(source: BenchmarkFiles) -> Benchmark:
    """The test set; its answers are in a file of their own, except in the layout with letters."""
    file = find_annotation_file(source.annotations, "test_question.json")
    videos = VideoFolder(source.video_dir)
    if _is_lettered(file):
        tasks = [_lettered(record, "MLVU test", videos) for record in read_annotations(file, LETTERED)]
    elif source.answer_file is None:
        raise UserError(
            f"{file} has questions alone: set `answers` to the file with MLVU test's ground truth"
        )
    else:
        truths, records = _truths(source.answer_file), read_annotations(file, TEST)
        tasks = [_test_task(record, truths, source.answer_file, videos) for record in records]
    return Benchmark("MLVU test", tuple(tasks), compute_choice_metrics, num_released=TEST_RELEASED)


def _files(root: Path, names: Iterable[str]) -> list[Path]:
    """The files of a folder, all of them; a file alone is all there is."""
    return [root] if root.is_file() else [find_annotation_file(root, name) for name in names]


def _is_lettered(file: Path) -> bool:
    """Which layout a file has, by its first record."""
    return "video_name" in read_first_record(file)


def _kind(name: str) -> str:
    """A task's name as its file has it, unnumbered: `1_plotQA` is `plotQA`, `findNeedle` is `needle`."""
    bare = name.split("_", 1)[1] if name[:1].isdigit() and "_" in name else name
    return OTHER_NAMES.get(bare, bare)


def _dev_task(record: AnnotationRecord, file: Path, index: int, videos: VideoFolder) -> Task:
    record.number("duration")
    options = letter_options(record.options("candidates"))
    return Task(
        task_id=f"{file.stem}/{index}",
        # Videos of each task are in a folder of their own, named as the file.
        video=videos.find(f"{file.stem}/{record.text('video')}"),
        question=format_question(record.text("question"), options),
        answer=_letter_of_text(record, options),
        source="MLVU dev",
        kind=_kind(record.text("question_type")),
        extra={"options": options},
    )


def _lettered(record: AnnotationRecord, name: str, videos: VideoFolder) -> Task:
    """A record whose answer is a letter, `B` or `(B)`, and whose question most often holds the options."""
    question = record.text("question")
    options = parse_options(question)
    if not options:
        options = letter_options(record.options("candidates"))
        question = format_question(question, options)
    answer = parse_choice(record.text("answer"), options)
    if answer not in options:
        raise record.field_error("answer", f"a letter from A to {max(options)}")
    return Task(
        task_id=f"{_kind(record.text('task_type'))}/{record.label('question_id')}",
        video=videos.find(record.text("video_name")),
        question=question,
        answer=answer,
        source=name,
        kind=_kind(record.text("task_type")),
        extra={"options": options},
    )


def _letter_of_text(record: AnnotationRecord, options: dict[str, str]) -> str:
    """The letter of the option whose text is the answer."""
    value = record.values.get("answer")
    answer = str(value).strip() if isinstance(value, int | float) else record.text("answer").strip()
    found = [letter for letter, option in options.items() if option == answer]
    if not found:
        raise record.field_error("answer", f"the text of one of {', '.join(map(repr, options.values()))}")
    return found[0]


def _truths(file: Path) -> dict[str, str]:
    """Answers by question id: a list of records, or an object."""
    values = read_annotation_json(file)
    if isinstance(values, dict):
        return {str(key): str(value) for key, value in values.items()}
    schema = AnnotationSchema("MLVU test's ground truth", ("question_id", "answer"))
    return {record.label("question_id"): record.label("answer") for record in read_annotations(file, schema)}


def _test_task(record: AnnotationRecord, truths: dict[str, str], file: Path, videos: VideoFolder) -> Task:
    options, name = letter_options(record.options("candidates")), record.label("question_id")
    if name not in truths:
        raise UserError(f"{file} has no answer to question {name} ({record.location})")
    answer = parse_choice(truths[name], options)
    if answer is None:
        raise UserError(
            f"{file}: the answer to question {name} is {truths[name]!r}; expected a letter from A to "
            f"{max(options)} or the text of one of {', '.join(map(repr, options.values()))}"
        )
    return Task(
        task_id=name,
        video=videos.find(record.text("video")),
        question=format_question(record.text("question"), options),
        answer=answer,
        source="MLVU test",
        kind=_kind(record.text("question_type")),
        extra={"options": options},
    )
