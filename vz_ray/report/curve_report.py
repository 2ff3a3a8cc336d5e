"""HTML report of accuracy curves over frames, zooms and frame rate: `curve.html` from `curve.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vz_ray.report.markup import format_number, format_percent, html_page, note, section, table
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
    benchmarks = "".join(_benchmark(benchmark, curve["paper"]) for benchmark in curve["benchmarks"].values())
    conditions = (
        f"{_models(curve['models'])}. Accuracy over questions, strict answer format; lines are "
        f"{100 * curve['interval_level']:g}% intervals, drawn over whole videos."
    )
    body = note(conditions) + (benchmarks or "<p>No episode has finished yet.</p>")
    return html_page(f"{name} · curves", name, body)


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
    columns = ("", "Accuracy", "Interval", "Frames", "p95", "Zooms", "Valid", "Seconds")
    rows = [row for label, points in models.items() for row in _rows(points, names[label])]
    return section(benchmark["title"], charts + table("", columns, rows), "charts pair")


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
    return _accuracy_chart("Accuracy against frames seen", series, "frames (logarithmic)", ticks)


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
    return _accuracy_chart("Accuracy against zooms allowed", [*drawn, published], "maximum zooms", ticks, x_log=False)


def _fps_chart(models: Json, names: Mapping[str, str]) -> str:
    """Chart of accuracy over a fixed zoom frame rate, with the rate chosen by the agent for comparison."""
    rates = sorted({point["fps"] for points in models.values() for point in points["fixed_fps"]})
    if not rates:
        return ""
    series = []
    for index, (label, points) in enumerate(models.items()):
        fixed = [(point["fps"], point) for point in points["fixed_fps"]]
        series.append(_series(f"{names[label]}fixed rate", fixed, _color(index)))
        if points["agent"]:
            unrestricted = points["agent"][-1]  # points are sorted by limit, None last
            level = [(rate, unrestricted["accuracy"]["mean"]) for rate in dict.fromkeys((rates[0], rates[-1]))]
            allowed = "" if unrestricted["limit"] is None else f", at most {unrestricted['limit']} zooms"
            series.append(
                ChartSeries(f"{names[label]}rate chosen by the agent{allowed}", level, _color(index), dashed=True)
            )
    return _accuracy_chart("Accuracy against the zooms' frame rate", series, "frames per second (logarithmic)", rates)


def _accuracy_chart(
    title: str, series: Sequence[ChartSeries], x_label: str, x_ticks: Sequence[float], x_log: bool = True
) -> str:
    return line_chart(title, series, x_label=x_label, as_percent=True, x_log=x_log, x_ticks=x_ticks)


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


def _rows(points: Json, prefix: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return one table row per point of a model."""
    named_points = [
        *((f"uniform, {point['limit']} frames", point) for point in points["uniform"]),
        *((_agent(point), point) for point in points["agent"]),
        *((f"{_agent(point)} at {point['fps']:g} fps", point) for point in points["fixed_fps"]),
    ]
    return [(f"{prefix}{name}", _cells(point)) for name, point in named_points]


def _agent(point: Json) -> str:
    return "agent" if point["limit"] is None else f"agent, {point['limit']} zooms"


def _cells(point: Json) -> tuple[str, ...]:
    accuracy = point["accuracy"]
    return (
        format_percent(accuracy["mean"]),
        f"{format_percent(accuracy['low'])} to {format_percent(accuracy['high'])}",
        format_number(point["frames_mean"]),
        format_number(point["frames_p95"], 0),
        format_number(point["zooms_mean"], 2),
        format_percent(point["valid_zoom_rate"]),
        format_number(point["seconds_mean"], 2),
    )
