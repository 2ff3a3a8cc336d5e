"""An ablation drawn: `ablation.html`, from the run's `ablation.json` and each variant's metrics."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vz_ray.config.ablation import (
    FULL,
    WITHOUT_COLD_START,
    WITHOUT_REFLECTION,
    WITHOUT_RL,
    WITHOUT_TOOL_REWARD,
    variant_title,
)
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.report.markup import escape, format_number, format_percent, report_css
from vz_ray.report.svg_chart import ChartSeries, line_chart
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError

Json = Mapping[str, Any]
Rows = Sequence[Mapping[str, float]]

REPORT_FILE = "ablation.html"

VARIANT_COLORS = {
    FULL: 1,
    WITHOUT_RL: 4,
    WITHOUT_COLD_START: 2,
    WITHOUT_REFLECTION: 3,
    WITHOUT_TOOL_REWARD: 5,
}
"""The colour of each variant, the same in every chart."""

CURVES = (
    (metric_names.REWARD_ACCURACY, "Right answers while training", True),
    (metric_names.ZOOMS_PER_EPISODE, "Zooms per episode while training", False),
    (metric_names.ZOOM_VALID_RATE, "Valid zooms while training", True),
    (metric_names.EVENT_COVERAGE, "Episodes with the event in a zoom, while training", True),
)


def write_ablation_report(run_dir: Path) -> Path:
    """Writes `ablation.html`, one file that needs no network; returns its path.

    Raises:
        UserError: The run has no `ablation.json`.
    """
    data = run_dir / "ablation.json"
    if not data.is_file():
        raise UserError(f"no ablation at {data}: `vz-ray ablate` makes one")
    found = json.loads(data.read_text(encoding="utf-8"))
    training = {
        variant: [read_metrics(run_dir / f"seed{seed}" / variant / "metrics.jsonl") for seed in one["seeds"]]
        for variant, one in found["variants"].items()
    }
    path = run_dir / REPORT_FILE
    write_atomic(path, render_ablation_report(found, training, run_dir.resolve().name).encode())
    return path


def render_ablation_report(ablation: Json, training: Mapping[str, Sequence[Rows]], name: str) -> str:
    """The page; `training` holds the metrics of each variant's seeds."""
    curves = "".join(_curve(metric, title, share, training) for metric, title, share in CURVES)
    body = (
        '<section><h2>Results</h2><div class="charts pair">'
        f"{_bars(ablation, 'accuracy')}{_bars(ablation, 'zooms')}{_claims(ablation)}{_table(ablation)}</div></section>"
        if ablation["variants"]
        else "<p>Nothing has been evaluated yet.</p>"
    )
    if curves:
        note = '<p class="note">Means over seeds.</p>'
        body += f'<section><h2>Training</h2><div class="charts">{curves}</div>{note}</section>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} · ablation</title><style>{report_css()}</style></head>"
        f'<body><main><header><h1>{escape(name)}</h1></header><p class="note">{escape(_about(ablation))}</p>'
        f"{body}</main></body></html>\n"
    )


def _about(found: Json) -> str:
    seeds = ", ".join(map(str, found["seeds"])) or "none yet"
    drawn = "seeds and whole videos" if len(found["seeds"]) > 1 else "whole videos"
    return (
        f"Needle world: {found['questions']} questions about {found['videos']} videos, seeds {seeds}. "
        f"Lines are {100 * found['interval_level']:g}% intervals over {drawn}; a difference whose "
        "interval contains 0 is inconclusive."
    )


def _title(variant: str) -> str:
    words = variant_title(variant)
    return f"{words[:1].upper()}{words[1:]}"


def _bars(found: Json, figure: str) -> str:
    """One bar per variant with its interval; the paper's figures are on another scale, and in the table."""
    share = figure == "accuracy"
    known = {name: one[figure] for name, one in found["variants"].items() if one[figure]}
    most = 1.0 if share else max((one["high"] for one in known.values()), default=0.0) or 1.0
    rows = ""
    for name, one in known.items():
        low, high, mean = (100 * one[end] / most for end in ("low", "high", "mean"))
        value = format_percent(one["mean"]) if share else format_number(one["mean"], 2)
        rows += (
            f'<div class="bar s{VARIANT_COLORS[name]}"><span>{escape(_title(name))}</span>'
            f'<div class="track"><b style="width:{mean:.2f}%"></b>'
            f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i></div><em>{value}</em></div>'
        )
    title = "Accuracy on held-out questions" if share else "Zooms per question"
    return f"<figure><figcaption>{title}</figcaption>{rows}</figure>"


def _claims(found: Json) -> str:
    """What the paper has, the paired difference here, and what that shows."""
    rows = ""
    for claim in found["claims"]:
        scale, digits = (100, 1) if claim["metric"] == "accuracy" else (1, 2)
        low, high, mean = (scale * claim["difference"][end] for end in ("low", "high", "mean"))
        seeds = " / ".join(f"{scale * value:+.{digits}f}" for value in claim["seeds"].values())
        what = f"{claim['metric']}: {variant_title(claim['greater'])} > {variant_title(claim['lesser'])}"
        cells = (
            f"{mean:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}", seeds, str(claim["questions"]),
            claim["status"],
        )  # fmt: skip
        rows += f"<tr><th>{escape(what)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    head = ("The paper has", "Difference", "Interval", "By seed", "Questions", "Here")
    holds = (
        "The paper's order holds." if found["order_holds"] else "The paper's order is not fully supported."
    )
    return _framed("Paired differences (accuracy in points)", head, rows, holds)


def _table(found: Json) -> str:
    rows = ""
    for name, one in found["variants"].items():
        seeds = " / ".join(format_percent(run["accuracy"]) for run in one["seeds"].values())
        cells = (
            format_percent(one["accuracy"] and one["accuracy"]["mean"]),
            seeds,
            format_number(one["frames_mean"]),
            format_number(one["zooms"] and one["zooms"]["mean"], 2),
            format_percent(one["zoom_call_rate"]),
            format_percent(one["valid_zoom_rate"]),
            format_percent(one["event_coverage"]),
            format_number(one["paper"]["accuracy"].get("longvideoreason/accuracy")),
            format_number(one["paper"]["accuracy"].get("mlvu_dev/micro")),
            format_number(one["paper"]["zooms"], 0),
        )
        rows += (
            f"<tr><th>{escape(_title(name))}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        )
    head = ("", "Accuracy", "By seed", "Frames", "Zooms", "Zooming", "Valid", "Event in a zoom")
    paper = ("Paper: LongVideoReason", "Paper: MLVU dev", "Paper: zooms, about")
    return _framed("All figures", (*head, *paper), rows, f"Paper: {found['paper']}, 7B.")


def _framed(title: str, head: Sequence[str], rows: str, note: str) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption><div class="scroll"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">{escape(note)}</p></figure>'
    )


def _curve(metric: str, title: str, share: bool, training: Mapping[str, Sequence[Rows]]) -> str:
    series = [
        ChartSeries(_title(variant), _mean_over_seeds(runs, metric), color=VARIANT_COLORS[variant])
        for variant, runs in training.items()
    ]
    return line_chart(title, [one for one in series if one.points], x_label="iteration", as_percent=share)


def _mean_over_seeds(runs: Sequence[Rows], metric: str) -> list[tuple[float, float]]:
    values: defaultdict[float, list[float]] = defaultdict(list)
    for rows in runs:
        for row in rows:
            if metric in row:
                values[row[metric_names.STEP]].append(row[metric])
    return [(step, fmean(found)) for step, found in sorted(values.items())]
