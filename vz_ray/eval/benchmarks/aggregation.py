"""Aggregation of task scores into metrics: overall, by label, macro averages. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vz_ray.env.task import Task

PERCENT = 100.0
GRADE = "grade"
"""Key of the judge's grade, 0 to 5, in `TaskScore.detail`."""
GRADE_TABLE = "grade, 0 to 5"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Score of one task.

    Attributes:
        task: The task.
        score: In `[0, 1]`; 1 is correct.
        detail: Further values that a metric needs, by name, such as correct options or a judge's grade.
    """

    task: Task
    score: float
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchmarkMetric:
    """One official metric of a benchmark.

    Attributes:
        name: Name of the metric, or of the row in a table.
        value: Value; None without samples.
        count: Number of averaged items: questions, or whatever the metric counts.
        table: Table that the metric belongs to; empty for headlines.
        scale: Display factor: 100 for fractions, 1 for grades.
    """

    name: str
    value: float | None
    count: int
    table: str = ""
    scale: float = PERCENT


ComputeMetrics = Callable[[Sequence[TaskScore]], list[BenchmarkMetric]]
"""Pure function from task scores to official metrics, headlines first."""

TaskLabel = Callable[[Task], str | Sequence[str]]
"""Returns the label of a task, or its labels if it has several."""


def mean_metric(values: Iterable[float], name: str, table: str = "", scale: float = PERCENT) -> BenchmarkMetric:
    """Return the mean of `values` as a metric."""
    items = list(values)
    return BenchmarkMetric(name, sum(items) / len(items) if items else None, len(items), table, scale)


def accuracy_metric(scores: Sequence[TaskScore], name: str = "accuracy", table: str = "") -> BenchmarkMetric:
    """Return the mean score (micro average)."""
    return mean_metric((score.score for score in scores), name, table)


def group_by(scores: Iterable[TaskScore], label: TaskLabel, order: Sequence[str] = ()) -> dict[str, list[TaskScore]]:
    """Group scores by label: labels in `order` first, others sorted by name.

    A task with several labels is in the group of each label.
    """
    groups: defaultdict[str, list[TaskScore]] = defaultdict(list)
    for score in scores:
        labels = label(score.task)
        for name in [labels] if isinstance(labels, str) else labels:
            groups[name].append(score)
    ordered = [name for name in order if name in groups]
    return {name: groups[name] for name in [*ordered, *sorted(set(groups) - set(ordered))]}


def accuracy_table(
    scores: Iterable[TaskScore], table: str, label: TaskLabel, order: Sequence[str] = ()
) -> list[BenchmarkMetric]:
    """Return the accuracy for each label."""
    return [accuracy_metric(members, name, table) for name, members in group_by(scores, label, order).items()]


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A table with the accuracy of each label; labels in `order` come first."""

    table: str
    label: TaskLabel
    order: Sequence[str] = ()


def accuracy_metrics(
    *breakdowns: Breakdown, name: str = "accuracy", subsets: Mapping[str, Callable[[Task], bool]] | None = None
) -> ComputeMetrics:
    """Return a function that computes the overall accuracy, the accuracy of subsets, and breakdowns.

    Args:
        breakdowns: Tables after the headlines.
        name: Name of the overall accuracy.
        subsets: Further headlines: by name, whether a task counts.
    """

    def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
        metrics = [accuracy_metric(scores, name)]
        for subset, contains in (subsets or {}).items():
            metrics.append(accuracy_metric([score for score in scores if contains(score.task)], subset))
        for breakdown in breakdowns:
            metrics += accuracy_table(scores, breakdown.table, breakdown.label, breakdown.order)
        return metrics

    return compute_metrics


def macro_average(metrics: Sequence[BenchmarkMetric], name: str) -> BenchmarkMetric:
    """Return the unweighted mean of metrics; `count` is the sum of their counts."""
    values = [metric.value for metric in metrics if metric.value is not None]
    value = sum(values) / len(values) if values else None
    return BenchmarkMetric(name, value, sum(metric.count for metric in metrics))


def judge_metrics(scores: Sequence[TaskScore], table: str, order: Sequence[str] = ()) -> list[BenchmarkMetric]:
    """Return accuracy and grade of judged answers: macro over kinds, micro average, then by kind."""
    accuracies = accuracy_table(scores, table, kind_label, order)
    grades = [
        mean_metric((score.detail[GRADE] for score in members if GRADE in score.detail), name, GRADE_TABLE, 1)
        for name, members in group_by(scores, kind_label, order).items()
    ]
    mean_grade = macro_average(grades, GRADE_TABLE)
    return [
        macro_average(accuracies, "accuracy"),
        BenchmarkMetric(mean_grade.name, mean_grade.value, mean_grade.count, scale=1),
        accuracy_metric(scores, "micro"),
        *accuracies,
        *grades,
    ]


def extra_label(key: str) -> TaskLabel:
    """Return a label function that reads `Task.extra[key]`."""

    def label(task: Task) -> str | Sequence[str]:
        value = task.extra[key]
        return [str(item) for item in value] if isinstance(value, list) else str(value)

    return label


def kind_label(task: Task) -> str:
    """Return the task's kind."""
    return task.kind
