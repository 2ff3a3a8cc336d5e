"""Official metrics as pure functions over scored samples: overall, by group, macro averages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vz_ray.env.task import Task

PERCENT = 100.0
GRADE = "grade"
"""What a judge gives beside right and wrong, 0 to 5: its name in `TaskScore.detail`."""
GRADE_TABLE = "grade, 0 to 5"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A question and what its answer is worth.

    Attributes:
        score: In `[0, 1]`; 1 is right.
        detail: Whatever else a metric counts, by name (options right, a judge's grade).
    """

    task: Task
    score: float
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchmarkMetric:
    """One number of a benchmark.

    Attributes:
        name: What it is: `accuracy`, or the group's name in a table.
        value: The number; None where nothing was there to measure.
        count: What it is the mean of: questions, or whatever the metric counts.
        table: The grouping it belongs to; empty for headlines.
        scale: What it is shown times: 100 for fractions, 1 for grades.
    """

    name: str
    value: float | None
    count: int
    table: str = ""
    scale: float = PERCENT


GroupLabel = Callable[[Task], str | Sequence[str]]
"""A question's group, or groups where it has several."""


def mean_metric(
    values: Iterable[float], name: str, table: str = "", scale: float = PERCENT
) -> BenchmarkMetric:
    """The mean of `values`."""
    found = list(values)
    return BenchmarkMetric(name, sum(found) / len(found) if found else None, len(found), table, scale)


def accuracy_metric(samples: Sequence[TaskScore], name: str = "accuracy", table: str = "") -> BenchmarkMetric:
    """Mean score over all samples (micro average)."""
    return mean_metric((sample.score for sample in samples), name, table)


def group_by(
    samples: Iterable[TaskScore], label: GroupLabel, order: Sequence[str] = ()
) -> dict[str, list[TaskScore]]:
    """Samples by group, `order` first, then by name; a question with several labels is in each."""
    groups: defaultdict[str, list[TaskScore]] = defaultdict(list)
    for sample in samples:
        labels = label(sample.task)
        for name in [labels] if isinstance(labels, str) else labels:
            groups[name].append(sample)
    known = [name for name in order if name in groups]
    return {name: groups[name] for name in [*known, *sorted(set(groups) - set(known))]}


def accuracy_table(
    samples: Iterable[TaskScore], table: str, label: GroupLabel, order: Sequence[str] = ()
) -> list[BenchmarkMetric]:
    """Accuracy of each group."""
    return [
        accuracy_metric(members, name, table) for name, members in group_by(samples, label, order).items()
    ]


def macro_average(figures: Sequence[BenchmarkMetric], name: str) -> BenchmarkMetric:
    """Mean of groups' means, each group counting the same; `count` is that of all their samples."""
    values = [figure.value for figure in figures if figure.value is not None]
    value = sum(values) / len(values) if values else None
    return BenchmarkMetric(name, value, sum(figure.count for figure in figures))


def judge_metrics(
    samples: Sequence[TaskScore], table: str, order: Sequence[str] = ()
) -> list[BenchmarkMetric]:
    """Of answers that a judge marks and grades, by kind: the means of kinds, the micro average, each kind."""
    right = accuracy_table(samples, table, kind_label, order)
    grades = [
        mean_metric(
            (sample.detail[GRADE] for sample in members if GRADE in sample.detail), name, GRADE_TABLE, 1
        )
        for name, members in group_by(samples, kind_label, order).items()
    ]
    over_kinds = macro_average(grades, GRADE_TABLE)
    return [
        macro_average(right, "accuracy"),
        BenchmarkMetric(over_kinds.name, over_kinds.value, over_kinds.count, scale=1),
        accuracy_metric(samples, "micro"),
        *right,
        *grades,
    ]


def extra_label(name: str) -> GroupLabel:
    """The label that an adapter left in `Task.extra`."""

    def label(task: Task) -> str | Sequence[str]:
        found = task.extra[name]
        return [str(item) for item in found] if isinstance(found, list) else str(found)

    return label


def kind_label(task: Task) -> str:
    """The label that is the task's kind."""
    return task.kind
