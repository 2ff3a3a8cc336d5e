"""MLVU: the dev set in both layouts, its open-ended tasks, and the test set.

Source of the metric: M-Avg is the macro average over the choice tasks. The
VideoZoomer paper reports micro averages; both are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    Breakdown,
    TaskScore,
    accuracy_metric,
    accuracy_metrics,
    accuracy_table,
    kind_label,
    macro_average,
)
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    find_annotation_files,
    read_annotation_json,
    read_annotations,
    read_first_record,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, format_question, letter_options
from vz_ray.rewards import parse_choice, parse_options
from vz_ray.utils.errors import UserError

DEV = AnnotationSchema(
    "MLVU dev",
    ("video", "duration", "question", "candidates", "answer", "question_type"),
    {
        "video_name": "the layout with letters, which cannot be mixed with this one",
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
    {"video": "the layout with texts, which cannot be mixed with this one"},
)
OPEN = AnnotationSchema("MLVU dev, open-ended", ("video", "duration", "question", "answer", "question_type"))

CHOICE_TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
OPEN_TASKS = ("sub_scene", "summary")
CHOICE_FILES = tuple(f"{number}_{name}.json" for number, name in enumerate(CHOICE_TASKS, start=1))
OPEN_FILES = tuple(f"{number}_{name}.json" for number, name in enumerate(OPEN_TASKS, start=8))
DEV_RELEASED, OPEN_RELEASED, TEST_RELEASED = 2174, 418, 502
TASK_ALIASES = {"findNeedle": "needle", "subPlot": "sub_scene"}
"""Task names in records that differ from their file's name."""


def compute_choice_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return M-Avg, the micro average, and the accuracy of each task."""
    tasks = accuracy_table(scores, "task", kind_label, CHOICE_TASKS)
    return [macro_average(tasks, "M-Avg"), accuracy_metric(scores, "micro"), *tasks]


def read_dev(files: BenchmarkFiles) -> Benchmark:
    """Read the seven choice tasks of the dev set: a folder of files, or one file in either layout."""
    tasks: list[Task] = []
    for file in find_annotation_files(files.annotations, CHOICE_FILES):
        if _is_lettered(file):
            tasks += [_lettered(record, "MLVU dev", files) for record in read_annotations(file, LETTERED)]
        else:
            records = enumerate(read_annotations(file, DEV))
            tasks += [_dev_task(record, file, index, files) for index, record in records]
    return Benchmark("MLVU dev", tuple(tasks), compute_choice_metrics, num_released=DEV_RELEASED)


def read_open(files: BenchmarkFiles) -> Benchmark:
    """Read the two open-ended tasks of the dev set, which need a judge."""
    tasks = tuple(
        Task(
            task_id=f"{file.stem}/{index}",
            video=files.videos.find(f"{file.stem}/{record.text('video')}"),
            question=record.text("question"),
            answer=record.text("answer"),
            answer_type=AnswerType.OPEN_ENDED,
            source="MLVU dev",
            kind=_kind(record.text("question_type")),
        )
        for file in find_annotation_files(files.annotations, OPEN_FILES)
        for index, record in enumerate(read_annotations(file, OPEN))
    )
    compute_metrics = accuracy_metrics(Breakdown("task", kind_label, OPEN_TASKS))
    return Benchmark("MLVU dev, open-ended", tasks, compute_metrics, num_released=OPEN_RELEASED)


def read_test(files: BenchmarkFiles) -> Benchmark:
    """Read the test set; the answers are in a separate file, except in the layout with letters."""
    file = find_annotation_file(files.annotations, "test_question.json")
    if _is_lettered(file):
        tasks = [_lettered(record, "MLVU test", files) for record in read_annotations(file, LETTERED)]
    elif files.answer_file is None:
        raise UserError(f"{file} has no answers; set `answers` to the file with MLVU test's ground truth")
    else:
        answers, records = _read_answers(files.answer_file), read_annotations(file, TEST)
        tasks = [_test_task(record, answers, files) for record in records]
    return Benchmark("MLVU test", tuple(tasks), compute_choice_metrics, num_released=TEST_RELEASED)


def _is_lettered(file: Path) -> bool:
    """Return whether the first record has the layout with letters."""
    return "video_name" in read_first_record(file)


def _kind(name: str) -> str:
    """Normalize a task name: `1_plotQA` becomes `plotQA`, `findNeedle` becomes `needle`."""
    task_name = name.split("_", 1)[1] if name[:1].isdigit() and "_" in name else name
    return TASK_ALIASES.get(task_name, task_name)


def _dev_task(record: AnnotationRecord, file: Path, index: int, files: BenchmarkFiles) -> Task:
    record.number("duration")
    options = letter_options(record.options("candidates"))
    return Task(
        task_id=f"{file.stem}/{index}",
        # Each task has its own video folder, named like its file.
        video=files.videos.find(f"{file.stem}/{record.text('video')}"),
        question=format_question(record.text("question"), options),
        answer=_letter_of_text(record, options),
        source="MLVU dev",
        kind=_kind(record.text("question_type")),
        extra={"options": options},
    )


def _lettered(record: AnnotationRecord, name: str, files: BenchmarkFiles) -> Task:
    """Convert a record with a letter as answer (`B` or `(B)`); its question usually contains the options."""
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
        video=files.videos.find(record.text("video_name")),
        question=question,
        answer=answer,
        source=name,
        kind=_kind(record.text("task_type")),
        extra={"options": options},
    )


def _letter_of_text(record: AnnotationRecord, options: dict[str, str]) -> str:
    """Return the letter of the option that equals the answer."""
    value = record.values.get("answer")
    answer = str(value).strip() if isinstance(value, int | float) else record.text("answer").strip()
    letters = [letter for letter, option in options.items() if option == answer]
    if not letters:
        raise record.field_error("answer", f"the text of one of {', '.join(map(repr, options.values()))}")
    return letters[0]


def _read_answers(file: Path) -> dict[str, str]:
    """Read answers by question id from a list of records or an object."""
    values = read_annotation_json(file)
    if isinstance(values, dict):
        return {str(key): str(value) for key, value in values.items()}
    schema = AnnotationSchema("MLVU test's ground truth", ("question_id", "answer"))
    return {record.label("question_id"): record.label("answer") for record in read_annotations(file, schema)}


def _test_task(record: AnnotationRecord, answers: dict[str, str], files: BenchmarkFiles) -> Task:
    options, question_id = letter_options(record.options("candidates")), record.label("question_id")
    if question_id not in answers:
        raise UserError(f"{files.answer_file} has no answer to question {question_id} ({record.location})")
    answer = parse_choice(answers[question_id], options)
    if answer is None:
        raise UserError(
            f"{files.answer_file}: the answer to question {question_id} is {answers[question_id]!r}; expected a letter "
            f"from A to {max(options)} or the text of one of {', '.join(map(repr, options.values()))}"
        )
    return Task(
        task_id=question_id,
        video=files.videos.find(record.text("video")),
        question=format_question(record.text("question"), options),
        answer=answer,
        source="MLVU test",
        kind=_kind(record.text("question_type")),
        extra={"options": options},
    )
