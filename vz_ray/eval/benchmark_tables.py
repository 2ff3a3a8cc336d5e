"""Benchmarks as tables for the terminal, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vz_ray.eval.benchmark_results import scale_value
from vz_ray.eval.eval_mode import EvalMode

BENCHMARKS_WIDTH = 180
"""Columns where the output is a file and has no width of its own."""
ONE_TABLE_WIDTH = 150
"""Columns from which figures and costs stand in one table."""

Json = Mapping[str, Any]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", min_width=16)
    for heading in headings:
        # A heading of several words may take several lines, but no word of it is cut.
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    return table


COST_COLUMNS = ("frames", "p95", "zooms", "valid %", "hit %", "s", "unparsed", "left out")


def headline_tables(found: Json, width: int) -> list[Table]:
    """A row per headline figure and mode, and what an episode cost; beside each other if there is room."""
    models = found["paper"]["shown"]
    figures = ("mode", "n", "strict", "lenient", *models)
    if width < ONE_TABLE_WIDTH:
        accuracy, costs = _table("Benchmarks", *figures), _table("Cost of a question", "mode", *COST_COLUMNS)
    else:
        accuracy, costs = _table("Benchmarks", *figures, *COST_COLUMNS), None
    for benchmark in found["benchmarks"].values():
        for mode, played in benchmark["modes"].items():
            headlines = [figure for figure in played["figures"] if not figure["table"]]
            for first, figure in zip([True, *[False] * len(headlines)], headlines, strict=False):
                row = [f"{benchmark['title']}, {figure['name']}", mode, *_values(figure, models)]
                cost = _costs(played) if first else [""] * len(COST_COLUMNS)
                accuracy.add_row(*row, *(cost if costs is None else ()))
            if costs is not None:
                costs.add_row(benchmark["title"], mode, *_costs(played))
    return [accuracy] if costs is None else [accuracy, costs]


def _values(figure: Json, models: Sequence[str]) -> list[str]:
    ours = [_number(scale_value(figure[name], figure["scale"])) for name in ("strict", "lenient")]
    return [str(figure["count"]), *ours, *(_number(figure["paper"].get(model)) for model in models)]


def _costs(played: Json) -> list[str]:
    cost, readings = played["metrics"], played["readings"]["strict"]
    return [
        _number(cost["frames_mean"]),
        _number(cost["frames_p95"], 0),
        _number(cost["zooms_mean"], 2),
        _percent(cost["valid_zoom_rate"]),
        _percent(cost["event_coverage"]),
        _number(cost["seconds_mean"], 2),
        str(readings["unparsed"] + readings["no_answer"]),
        str(readings["unjudged"] + readings["failed"]),
    ]


def breakdown_tables(benchmark: Json, paper: Json) -> list[Table]:
    """One table per grouping of a benchmark: groups down, modes across."""
    figures = [figure for played in benchmark["modes"].values() for figure in played["figures"]]
    names = dict.fromkeys(figure["table"] for figure in figures if figure["table"])
    return [_group_table(name, benchmark, paper) for name in names]


def _group_table(name: str, benchmark: Json, paper: Json) -> Table:
    rows: dict[str, dict[str, Json]] = {}
    for mode, played in benchmark["modes"].items():
        for figure in played["figures"]:
            if figure["table"] == name:
                rows.setdefault(figure["name"], {})[mode] = figure
    known = [m for m in paper["shown"] if any(m in f["paper"] for row in rows.values() for f in row.values())]
    table = _table(f"{benchmark['title']}: {name}", *benchmark["modes"], *known, "n")
    for group, row in rows.items():
        any_of = next(iter(row.values()))
        found = [row.get(mode) for mode in benchmark["modes"]]
        values = [_number(scale_value(f["strict"], f["scale"]) if f else None) for f in found]
        published = [_number(any_of["paper"].get(model)) for model in known]
        table.add_row(group, *values, *published, str(any_of["count"]))
    return table


def benchmark_notes(benchmark: Json) -> list[str]:
    """What must be known to read a benchmark's figures: what was left out, and what was odd."""
    said = []
    if (missing := benchmark["missing"])["videos"]:
        said.append(
            f"{missing['videos']} of {missing['of']} videos do not exist: "
            f"their {missing['questions']} questions were left out"
        )
    of = benchmark["released"] or benchmark["read"]
    if benchmark["asked"] != of:
        said.append(f"{benchmark['asked']} of {of} questions were asked")
    for mode, played in benchmark["modes"].items():
        counts = played["readings"]["strict"]
        if left := counts["unjudged"] + counts["failed"]:
            said.append(
                f"{EvalMode.parse(mode).title}: {left} questions are in no figure "
                f"({counts['unjudged']} not judged, {counts['failed']} failed)"
            )
        if fell := played["metrics"]["selector_fallbacks"]:
            said.append(
                f"{EvalMode.parse(mode).title}: {fell} questions were shown uniform frames, "
                "for want of a record in the frame selector's index"
            )
        if (rate := played["metrics"]["gate_rate"]) is not None:
            said.append(f"{EvalMode.parse(mode).title}: the gate let {rate:.1%} of the questions zoom")
    return [f"{benchmark['title']}: {line}" for line in [*said, *benchmark["notes"]]]


def print_benchmark_results(found: Json, console: Console | None = None) -> None:
    """The tables of a run."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, BENCHMARKS_WIDTH)
    for benchmark in found["benchmarks"].values():
        for table in breakdown_tables(benchmark, found["paper"]):
            console.print(table)
    for table in headline_tables(found, console.width):
        console.print(table)
    lines = [line for benchmark in found["benchmarks"].values() for line in benchmark_notes(benchmark)]
    lines.append(
        "strict: the answer span alone; lenient: the last turn where the span says nothing; "
        "unparsed: no answer could be read, which is wrong; left out: not judged, or failed; "
        "hit: a zoom showed what is asked about, where that is known"
    )
    lines.append(f"named models: {found['paper']['source']}")
    for line in lines:
        console.print(line, highlight=False, markup=False)
