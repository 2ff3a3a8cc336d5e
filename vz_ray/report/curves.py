"""Accuracy against frames and zooms, drawn: `curve.html`, from the run's `curve.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from vz_ray.observe.errors import UserError
from vz_ray.observe.run_dir import write_atomic
from vz_ray.report.chart import Series, line_chart
from vz_ray.report.markup import number, percent, text

Json = Mapping[str, Any]


def write_curves(run_dir: Path) -> Path:
    """Writes `curve.html`, one file that needs no network; returns its path.

    Raises:
        UserError: The run has no `curve.json`.
    """
    data = run_dir / "curve.json"
    if not data.is_file():
        raise UserError(f"no curve at {data}: `vz-ray eval --curve` makes one")
    path = run_dir / "curve.html"
    write_atomic(path, render_curves(json.loads(data.read_text(encoding="utf-8")), run_dir.name).encode())
    return path


def render_curves(curve: Json, name: str) -> str:
    """The page of a run's curves."""
    body = "".join(_benchmark(benchmark, curve["paper"]) for benchmark in curve["benchmarks"].values())
    css = files("vz_ray.report").joinpath("report.css").read_text(encoding="utf-8")
    level = f"{100 * curve['interval_level']:g}%"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(name)} · curves</title><style>{css}</style></head>"
        f"<body><main><header><h1>{text(name)}</h1></header>"
        f'<p class="note">Model: {text(curve["model"])}. Accuracy over questions, strictly read; '
        f"lines are {level} intervals, drawn over whole videos.</p>"
        f"{body or '<p>Nothing has been played yet.</p>'}</main></body></html>\n"
    )


def _benchmark(benchmark: Json, source: str) -> str:
    uniform, agent = benchmark["uniform"], benchmark["agent"]
    frames = line_chart(
        "Accuracy against frames seen",
        [
            _series("Uniform frames", [(p["limit"], p) for p in uniform], 2),
            _series("Agent", [(p["frames_mean"], p) for p in agent], 1),
        ],
        x_label="frames (logarithmic)",
        as_percent=True,
        x_log=True,
        x_ticks=[p["limit"] for p in uniform],
    )
    limited = [(p["limit"], p) for p in agent if p["limit"] is not None]
    zooms = line_chart(
        "Accuracy against zooms allowed",
        [_series("Agent", limited, 1), _published(benchmark["paper_zooms"], source)],
        x_label="most zooms",
        as_percent=True,
        x_ticks=[limit for limit, _ in limited],
    )
    charts = frames + (zooms if len(limited) > 1 else "")
    body = charts + _table([*uniform, *agent], len(uniform))
    return f'<section><h2>{text(benchmark["title"])}</h2><div class="charts pair">{body}</div></section>'


def _series(name: str, points: Sequence[tuple[float, Json]], slot: int) -> Series:
    ordered = sorted(points, key=lambda item: item[0])
    return Series(
        name,
        [(x, point["accuracy"]["mean"]) for x, point in ordered],
        slot=slot,
        marked=True,
        whiskers=[(point["accuracy"]["low"], point["accuracy"]["high"]) for _, point in ordered],
    )


def _published(values: Sequence[float], source: str) -> Series:
    return Series(f"VideoZoomer 7B ({source})", list(enumerate(values)), slot=3, marked=True)


def _table(points: Sequence[Json], uniform: int) -> str:
    names = ("", "Accuracy", "Interval", "Frames", "p95", "Zooms", "Valid", "Seconds")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(_row(point, index < uniform) for index, point in enumerate(points))
    return (
        '<figure class="wide"><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></figure>"
    )


def _row(point: Json, uniform: bool) -> str:
    limit, accuracy = point["limit"], point["accuracy"]
    name = f"uniform, {limit} frames" if uniform else "agent" if limit is None else f"agent, {limit} zooms"
    cells = (
        percent(accuracy["mean"]),
        f"{percent(accuracy['low'])} to {percent(accuracy['high'])}",
        number(point["frames_mean"]),
        number(point["frames_p95"], 0),
        number(point["zooms_mean"], 2),
        percent(point["valid_zoom_rate"]),
        number(point["seconds_mean"], 2),
    )
    return f"<tr><th>{text(name)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"
