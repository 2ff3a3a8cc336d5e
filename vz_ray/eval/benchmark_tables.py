"""Terminal tables of `benchmarks.json`, with the paper's results as a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vz_ray.eval.benchmark_results import scale_value
from vz_ray.eval.eval_mode import EvalMode
from vz_ray.eval.tables import number_cell, percent_cell, results_table
from vz_ray.utils.console import make_console

BENCHMARKS_WIDTH = 180
"""Minimum width in columns if the output is not a terminal."""
ONE_TABLE_WIDTH = 150
"""Minimum width in columns for accuracy and costs in one table."""

Json = Mapping[str, Any]


COST_COLUMNS = ("frames", "p95", "zooms", "valid %", "hit %", "s", "unparsed", "excluded")


def headline_tables(report: Json, width: int) -> list[Table]:
    """Return headline metrics and costs per mode: one table if `width` allows, else two."""
    models = report["paper"]["models"]
    columns = ("mode", "n", "strict", "lenient", *models)
    if width < ONE_TABLE_WIDTH:
        accuracy_table = results_table("Benchmarks", *columns, first_width=16)
        cost_table = results_table("Cost per question", "mode", *COST_COLUMNS, first_width=16)
    else:
        accuracy_table, cost_table = results_table("Benchmarks", *columns, *COST_COLUMNS, first_width=16), None
    for benchmark in report["benchmarks"].values():
        for mode, results in benchmark["modes"].items():
            headlines = [score for score in results["scores"] if not score["table"]]
            for number, score in enumerate(headlines):
                row = [f"{benchmark['title']}, {score['name']}", mode, *_values(score, models)]
                costs = [""] * len(COST_COLUMNS) if number else _costs(results)
                accuracy_table.add_row(*row, *(costs if cost_table is None else ()))
            if cost_table is not None:
                cost_table.add_row(benchmark["title"], mode, *_costs(results))
    return [accuracy_table] if cost_table is None else [accuracy_table, cost_table]


def _values(score: Json, models: Sequence[str]) -> list[str]:
    values = [number_cell(scale_value(score[name], score["scale"])) for name in ("strict", "lenient")]
    return [str(score["count"]), *values, *(number_cell(score["paper"].get(model)) for model in models)]


def _costs(results: Json) -> list[str]:
    metrics, statuses = results["metrics"], results["answer_status"]["strict"]
    return [
        number_cell(metrics["frames_mean"]),
        number_cell(metrics["frames_p95"], 0),
        number_cell(metrics["zooms_mean"], 2),
        percent_cell(metrics["valid_zoom_rate"]),
        percent_cell(metrics["event_coverage"]),
        number_cell(metrics["seconds_mean"], 2),
        str(statuses["unparsed"] + statuses["no_answer"]),
        str(statuses["unjudged"] + statuses["failed"]),
    ]


def breakdown_tables(benchmark: Json, paper: Json) -> list[Table]:
    """Return one table per breakdown of a benchmark: categories as rows, modes as columns."""
    scores = [score for results in benchmark["modes"].values() for score in results["scores"]]
    names = dict.fromkeys(score["table"] for score in scores if score["table"])
    return [_breakdown_table(name, benchmark, paper) for name in names]


def _breakdown_table(name: str, benchmark: Json, paper: Json) -> Table:
    rows: dict[str, dict[str, Json]] = {}
    for mode, results in benchmark["modes"].items():
        for score in results["scores"]:
            if score["table"] == name:
                rows.setdefault(score["name"], {})[mode] = score
    published = {model for row in rows.values() for score in row.values() for model in score["paper"]}
    models = [model for model in paper["models"] if model in published]
    table = results_table(f"{benchmark['title']}: {name}", *benchmark["modes"], *models, "n", first_width=16)
    for category, row in rows.items():
        first_score = next(iter(row.values()))
        scores = [row.get(mode) for mode in benchmark["modes"]]
        values = [number_cell(scale_value(score["strict"], score["scale"]) if score else None) for score in scores]
        paper_values = [number_cell(first_score["paper"].get(model)) for model in models]
        table.add_row(category, *values, *paper_values, str(first_score["count"]))
    return table


def benchmark_notes(benchmark: Json) -> list[str]:
    """Return notes on missing videos, sampling, exclusions and oddities in the annotations."""
    notes = []
    if (missing := benchmark["missing"])["videos"]:
        notes.append(
            f"{missing['videos']} of {missing['total_videos']} videos are missing; "
            f"their {missing['questions']} questions were skipped"
        )
    total = benchmark["questions_released"] or benchmark["questions_read"]
    if benchmark["questions_evaluated"] != total:
        notes.append(f"evaluated {benchmark['questions_evaluated']} of {total} questions")
    for mode, results in benchmark["modes"].items():
        title = EvalMode.parse(mode).title
        statuses, metrics = results["answer_status"]["strict"], results["metrics"]
        if excluded := statuses["unjudged"] + statuses["failed"]:
            notes.append(
                f"{title}: excluded {excluded} questions from all metrics "
                f"({statuses['unjudged']} not judged, {statuses['failed']} failed)"
            )
        if fallbacks := metrics["selector_fallbacks"]:
            notes.append(
                f"{title}: {fallbacks} questions fell back to uniform frames; "
                "the frame selector's index has no record for them"
            )
        if (rate := metrics["gate_rate"]) is not None:
            notes.append(f"{title}: the zoom gate let {rate:.1%} of the questions zoom")
    return [f"{benchmark['title']}: {note}" for note in [*notes, *benchmark["notes"]]]


def print_benchmark_results(report: Json, console: Console | None = None) -> None:
    """Print the tables and notes of a run."""
    console = make_console(BENCHMARKS_WIDTH, console)
    for benchmark in report["benchmarks"].values():
        for table in breakdown_tables(benchmark, report["paper"]):
            console.print(table)
    for table in headline_tables(report, console.width):
        console.print(table)
    notes = [note for benchmark in report["benchmarks"].values() for note in benchmark_notes(benchmark)]
    notes.append(
        "strict: answer span only; lenient: falls back to the last turn if the span cannot be parsed; "
        "unparsed: the answer cannot be parsed and counts as wrong; excluded: not judged, or failed; "
        "hit: a zoom returned a frame of the evidence span, if the benchmark has one"
    )
    notes.append(f"named models: {report['paper']['source']}")
    for note in notes:
        console.print(note, highlight=False, markup=False)
