"""HTML report of accuracy curves over frames, zooms and frame rate: `curve.html` from `curve.json`."""

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

_COLORS = (1, 2, 4, 5)
"""Colors of the models; the paper has color 3."""


def write_curve_report(run_dir: Path) -> Path:
    """Write `curve.html`, a self-contained page, and return its path.

    Raises:
        UserError: The run has no `curve.json`.
    """
    data = run_dir / "curve.json"
    if not data.is_file():
        raise UserError(f"no curve at {data}: run `vz-ray eval --curve` first")
    path = run_dir / "curve.html"
    write_atomic(path, render_curve_report(json.loads(data.read_text(encoding="utf-8")), run_dir.name).encode())
    return path


def render_curve_report(curve: Json, name: str) -> str:
    """Render the page."""
    body = "".join(_benchmark(benchmark, curve["paper"]) for benchmark in curve["benchmarks"].values())
    level = f"{100 * curve['interval_level']:g}%"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} · curves</title><style>{report_css()}</style></head>"
        f"<body><main><header><h1>{escape(name)}</h1></header>"
        f'<p class="note">{escape(_models(curve["models"]))}. Accuracy over questions, strict answer format; '
        f"lines are {level} intervals, drawn over whole videos.</p>"
        f"{body or '<p>No episode has finished yet.</p>'}</main></body></html>\n"
    )


def _models(models: Mapping[str, str]) -> str:
    """Name the models and their labels."""
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
    rows = "".join(_rows(points, names[label]) for label, points in models.items())
    return (
        f'<section><h2>{escape(benchmark["title"])}</h2><div class="charts pair">{charts}{_table(rows)}</div></section>'
    )


def _color(index: int) -> int:
    return _COLORS[index % len(_COLORS)]


def _frames_chart(models: Json, names: Mapping[str, str]) -> str:
    """Chart of accuracy over frames, uniform and selected by the agent; one color per model."""
    series = []
    for index, (label, points) in enumerate(models.items()):
        uniform = [(point["limit"], point) for point in points["uniform"]]
        agent = [(point["frames_mean"], point) for point in points["agent"]]
        series += [
            _series(f"{names[label]}uniform frames", uniform, _color(index), dashed=True),
            _series(f"{names[label]}agent", agent, _color(index)),
        ]
    ticks = sorted({point["limit"] for points in models.values() for point in points["uniform"]})
    return line_chart(
        "Accuracy against frames seen",
        series,
        x_label="frames (logarithmic)",
        as_percent=True,
        x_log=True,
        x_ticks=ticks,
    )


def _zooms_chart(models: Json, names: Mapping[str, str], published: ChartSeries) -> str:
    """Chart of accuracy over the maximum number of zooms, with the paper's; empty with a single maximum."""
    limited = {
        label: [(point["limit"], point) for point in points["agent"] if point["limit"] is not None]
        for label, points in models.items()
    }
    ticks = sorted({limit for points in limited.values() for limit, _ in points})
    if len(ticks) < 2:
        return ""
    drawn = [
        _series(f"{names[label]}agent", points, _color(index)) for index, (label, points) in enumerate(limited.items())
    ]
    return line_chart(
        "Accuracy against zooms allowed",
        [*drawn, published],
        x_label="maximum zooms",
        as_percent=True,
        x_ticks=ticks,
    )


def _fps_chart(models: Json, names: Mapping[str, str]) -> str:
    """Chart of accuracy over a fixed zoom frame rate, with the rate chosen by the agent for comparison."""
    rates = sorted({point["fps"] for points in models.values() for point in points["fixed_fps"]})
    if not rates:
        return ""
    series = []
    for index, (label, points) in enumerate(models.items()):
        fixed = [(point["fps"], point) for point in points["fixed_fps"]]
        series.append(_series(f"{names[label]}fixed rate", fixed, _color(index)))
        if unrestricted := _least_restricted(points["agent"]):
            level = [(rate, unrestricted["accuracy"]["mean"]) for rate in dict.fromkeys((rates[0], rates[-1]))]
            allowed = "" if unrestricted["limit"] is None else f", at most {unrestricted['limit']} zooms"
            series.append(
                ChartSeries(f"{names[label]}rate chosen by the agent{allowed}", level, _color(index), dashed=True)
            )
    return line_chart(
        "Accuracy against the zooms' frame rate",
        series,
        x_label="frames a second (logarithmic)",
        as_percent=True,
        x_log=True,
        x_ticks=rates,
    )


def _least_restricted(agent: Sequence[Json]) -> Json | None:
    """Return the point without a limit, or with the highest limit; points are sorted by limit."""
    return agent[-1] if agent else None


def _series(name: str, points: Sequence[tuple[float, Json]], color: int, *, dashed: bool = False) -> ChartSeries:
    ordered = sorted(points, key=lambda item: item[0])
    return ChartSeries(
        name,
        [(x, point["accuracy"]["mean"]) for x, point in ordered],
        color=color,
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


def _rows(points: Json, prefix: str) -> str:
    """Render one table row per point of a model."""
    named_points = [
        *((f"{prefix}uniform, {point['limit']} frames", point) for point in points["uniform"]),
        *((f"{prefix}{_agent(point)}", point) for point in points["agent"]),
        *((f"{prefix}{_agent(point)} at {point['fps']:g} fps", point) for point in points["fixed_fps"]),
    ]
    return "".join(_row(name, point) for name, point in named_points)


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
