"""Accuracy against frames, zooms and the zooms' frame rate, drawn: `curve.html`, from `curve.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vz_ray.report.markup import escape, format_number, format_percent, report_css
from vz_ray.report.svg_chart import ChartSeries, line_chart
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError

Json = Mapping[str, Any]

_SLOTS = (1, 2, 4, 5)
"""Colours of the models, in order; 3 is the paper's."""


def write_curve_report(run_dir: Path) -> Path:
    """Writes `curve.html`, one file that needs no network; returns its path.

    Raises:
        UserError: The run has no `curve.json`.
    """
    data = run_dir / "curve.json"
    if not data.is_file():
        raise UserError(f"no curve at {data}: `vz-ray eval --curve` makes one")
    path = run_dir / "curve.html"
    write_atomic(
        path, render_curve_report(json.loads(data.read_text(encoding="utf-8")), run_dir.name).encode()
    )
    return path


def render_curve_report(curve: Json, name: str) -> str:
    """The page of a run's curves."""
    body = "".join(_benchmark(benchmark, curve["paper"]) for benchmark in curve["benchmarks"].values())
    level = f"{100 * curve['interval_level']:g}%"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} · curves</title><style>{report_css()}</style></head>"
        f"<body><main><header><h1>{escape(name)}</h1></header>"
        f'<p class="note">{escape(_models(curve["models"]))}. Accuracy over questions, strictly read; '
        f"lines are {level} intervals, drawn over whole videos.</p>"
        f"{body or '<p>Nothing has been played yet.</p>'}</main></body></html>\n"
    )


def _models(models: Mapping[str, str]) -> str:
    """Who was played, and under which label."""
    own, *others = models.items()
    compared = "".join(f"; {label}: {checkpoint}" for label, checkpoint in others)
    return f"Model: {own[1]}{compared}"


def _benchmark(benchmark: Json, source: str) -> str:
    models = benchmark["models"]
    names = {label: "" if len(models) == 1 else f"{label}: " for label in models}
    charts = (
        _frames_chart(models, names)
        + _zooms_chart(models, names, _published(benchmark["paper_zooms"], source))
        + _fps_chart(models, names)
    )
    rows = "".join(_rows(played, names[label]) for label, played in models.items())
    return (
        f"<section><h2>{escape(benchmark['title'])}</h2>"
        f'<div class="charts pair">{charts}{_table(rows)}</div></section>'
    )


def _slot(index: int) -> int:
    return _SLOTS[index % len(_SLOTS)]


def _frames_chart(models: Json, names: Mapping[str, str]) -> str:
    """What a model makes of uniform frames, and of those that it chose: one colour for each model."""
    series = []
    for index, (label, played) in enumerate(models.items()):
        uniform = [(point["limit"], point) for point in played["uniform"]]
        agent = [(point["frames_mean"], point) for point in played["agent"]]
        series += [
            _series(f"{names[label]}uniform frames", uniform, _slot(index), dashed=True),
            _series(f"{names[label]}agent", agent, _slot(index)),
        ]
    ticks = sorted({point["limit"] for played in models.values() for point in played["uniform"]})
    return line_chart(
        "Accuracy against frames seen",
        series,
        x_label="frames (logarithmic)",
        as_percent=True,
        x_log=True,
        x_ticks=ticks,
    )


def _zooms_chart(models: Json, names: Mapping[str, str], published: ChartSeries) -> str:
    """By the most zooms allowed, beside the paper's; nothing where only one number was allowed."""
    limited = {
        label: [(point["limit"], point) for point in played["agent"] if point["limit"] is not None]
        for label, played in models.items()
    }
    ticks = sorted({limit for points in limited.values() for limit, _ in points})
    if len(ticks) < 2:
        return ""
    drawn = [
        _series(f"{names[label]}agent", points, _slot(index))
        for index, (label, points) in enumerate(limited.items())
    ]
    return line_chart(
        "Accuracy against zooms allowed",
        [*drawn, published],
        x_label="most zooms",
        as_percent=True,
        x_ticks=ticks,
    )


def _fps_chart(models: Json, names: Mapping[str, str]) -> str:
    """By the rate that every zoom was shown at, beside the same agent with rates of its own choice."""
    rates = sorted({point["fps"] for played in models.values() for point in played["fixed_fps"]})
    if not rates:
        return ""
    series = []
    for index, (label, played) in enumerate(models.items()):
        fixed = [(point["fps"], point) for point in played["fixed_fps"]]
        series.append(_series(f"{names[label]}fixed rate", fixed, _slot(index)))
        if free := _freest(played["agent"]):
            level = [(rate, free["accuracy"]["mean"]) for rate in dict.fromkeys((rates[0], rates[-1]))]
            allowed = "" if free["limit"] is None else f", at most {free['limit']} zooms"
            series.append(
                ChartSeries(
                    f"{names[label]}rate chosen by the agent{allowed}", level, _slot(index), dashed=True
                )
            )
    return line_chart(
        "Accuracy against the zooms' frame rate",
        series,
        x_label="frames a second (logarithmic)",
        as_percent=True,
        x_log=True,
        x_ticks=rates,
    )


def _freest(agent: Sequence[Json]) -> Json | None:
    """The point with the fewest restrictions: without a limit, else with the highest; they come in order."""
    return agent[-1] if agent else None


def _series(
    name: str, points: Sequence[tuple[float, Json]], slot: int, *, dashed: bool = False
) -> ChartSeries:
    ordered = sorted(points, key=lambda item: item[0])
    return ChartSeries(
        name,
        [(x, point["accuracy"]["mean"]) for x, point in ordered],
        color=slot,
        markers=True,
        whiskers=[(point["accuracy"]["low"], point["accuracy"]["high"]) for _, point in ordered],
        dashed=dashed,
    )


def _published(values: Sequence[float], source: str) -> ChartSeries:
    return ChartSeries(f"VideoZoomer 7B ({source})", list(enumerate(values)), color=3, markers=True)


def _table(rows: str) -> str:
    names = ("", "Accuracy", "Interval", "Frames", "p95", "Zooms", "Valid", "Seconds")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        '<figure class="wide"><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></figure>"
    )


def _rows(played: Json, who: str) -> str:
    """A row for each point of a model."""
    named = [
        *((f"{who}uniform, {point['limit']} frames", point) for point in played["uniform"]),
        *((f"{who}{_agent(point)}", point) for point in played["agent"]),
        *((f"{who}{_agent(point)} at {point['fps']:g} fps", point) for point in played["fixed_fps"]),
    ]
    return "".join(_row(name, point) for name, point in named)


def _agent(point: Json) -> str:
    return "agent" if point["limit"] is None else f"agent, {point['limit']} zooms"


def _row(name: str, point: Json) -> str:
    accuracy = point["accuracy"]
    cells = (
        format_percent(accuracy["mean"]),
        f"{format_percent(accuracy['low'])} to {format_percent(accuracy['high'])}",
        format_number(point["frames_mean"]),
        format_number(point["frames_p95"], 0),
        format_number(point["zooms_mean"], 2),
        format_percent(point["valid_zoom_rate"]),
        format_number(point["seconds_mean"], 2),
    )
    return f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
