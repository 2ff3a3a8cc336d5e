"""HTML report of an ablation: `ablation.html` from `ablation.json` and the metrics of each variant."""

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
"""Chart color of each variant."""

CURVES = (
    (metric_names.REWARD_ACCURACY, "Right answers while training", True),
    (metric_names.ZOOMS_PER_EPISODE, "Zooms per episode while training", False),
    (metric_names.ZOOM_VALID_RATE, "Valid zooms while training", True),
    (metric_names.EVENT_COVERAGE, "Episodes with the event in a zoom, while training", True),
)


def write_ablation_report(run_dir: Path) -> Path:
    """Write `ablation.html`, a self-contained page, and return its path.

    Raises:
        UserError: The run has no `ablation.json`.
    """
    data = run_dir / "ablation.json"
    if not data.is_file():
        raise UserError(f"no ablation at {data}: run `vz-ray ablate` first")
    ablation = json.loads(data.read_text(encoding="utf-8"))
    training = {
        variant: [read_metrics(run_dir / f"seed{seed}" / variant / "metrics.jsonl") for seed in values["seeds"]]
        for variant, values in ablation["variants"].items()
    }
    path = run_dir / REPORT_FILE
    write_atomic(path, render_ablation_report(ablation, training, run_dir.resolve().name).encode())
    return path


def render_ablation_report(ablation: Json, training: Mapping[str, Sequence[Rows]], name: str) -> str:
    """Render the page. `training` has the metric rows of each variant and seed."""
    curves = "".join(_curve(metric, title, share, training) for metric, title, share in CURVES)
    body = (
        '<section><h2>Results</h2><div class="charts pair">'
        f"{_bars(ablation, 'accuracy')}{_bars(ablation, 'zooms')}{_claims(ablation)}{_table(ablation)}</div></section>"
        if ablation["variants"]
        else "<p>No evaluation has finished yet.</p>"
    )
    if curves:
        note = '<p class="note">Means over seeds.</p>'
        body += f'<section><h2>Training</h2><div class="charts">{curves}</div>{note}</section>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} · ablation</title><style>{report_css()}</style></head>"
        f'<body><main><header><h1>{escape(name)}</h1></header><p class="note">{escape(_describe(ablation))}</p>'
        f"{body}</main></body></html>\n"
    )


def _describe(ablation: Json) -> str:
    seeds = ", ".join(map(str, ablation["seeds"])) or "none yet"
    resampled = "seeds and whole videos" if len(ablation["seeds"]) > 1 else "whole videos"
    return (
        f"Needle world: {ablation['questions']} questions about {ablation['videos']} videos, seeds {seeds}. "
        f"Lines are {100 * ablation['interval_level']:g}% intervals over {resampled}; a difference whose "
        "interval contains 0 is inconclusive."
    )


def _title(variant: str) -> str:
    title = variant_title(variant)
    return f"{title[:1].upper()}{title[1:]}"


def _bars(ablation: Json, metric: str) -> str:
    """Render one bar with interval per variant. The paper's values have another scale and are in the table."""
    share = metric == "accuracy"
    intervals = {name: v[metric] for name, v in ablation["variants"].items() if v[metric]}
    scale_max = 1.0 if share else max((i["high"] for i in intervals.values()), default=0.0) or 1.0
    rows = ""
    for name, interval in intervals.items():
        low, high, mean = (100 * interval[end] / scale_max for end in ("low", "high", "mean"))
        value = format_percent(interval["mean"]) if share else format_number(interval["mean"], 2)
        rows += (
            f'<div class="bar s{VARIANT_COLORS[name]}"><span>{escape(_title(name))}</span>'
            f'<div class="track"><b style="width:{mean:.2f}%"></b>'
            f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i></div><em>{value}</em></div>'
        )
    title = "Accuracy on held-out questions" if share else "Zooms per question"
    return f"<figure><figcaption>{title}</figcaption>{rows}</figure>"


def _claims(ablation: Json) -> str:
    """Render the paper's claims, the paired differences of this run, and whether they support the claims."""
    rows = ""
    for claim in ablation["claims"]:
        scale, digits = (100, 1) if claim["metric"] == "accuracy" else (1, 2)
        low, high, mean = (scale * claim["difference"][end] for end in ("low", "high", "mean"))
        seeds = " / ".join(f"{scale * value:+.{digits}f}" for value in claim["seeds"].values())
        title = f"{claim['metric']}: {variant_title(claim['greater'])} > {variant_title(claim['lesser'])}"
        cells = (
            f"{mean:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}", seeds, str(claim["questions"]),
            claim["status"],
        )  # fmt: skip
        rows += f"<tr><th>{escape(title)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    head = ("The paper has", "Difference", "Interval", "By seed", "Questions", "Here")
    holds = "The paper's order holds." if ablation["order_holds"] else "The paper's order is not fully supported."
    return _framed_table("Paired differences (accuracy in points)", head, rows, holds)


def _table(ablation: Json) -> str:
    rows = ""
    for name, values in ablation["variants"].items():
        seeds = " / ".join(format_percent(run["accuracy"]) for run in values["seeds"].values())
        cells = (
            format_percent(values["accuracy"] and values["accuracy"]["mean"]),
            seeds,
            format_number(values["frames_mean"]),
            format_number(values["zooms"] and values["zooms"]["mean"], 2),
            format_percent(values["zoom_call_rate"]),
            format_percent(values["valid_zoom_rate"]),
            format_percent(values["event_coverage"]),
            format_number(values["paper"]["accuracy"].get("longvideoreason/accuracy")),
            format_number(values["paper"]["accuracy"].get("mlvu_dev/micro")),
            format_number(values["paper"]["zooms"], 0),
        )
        rows += f"<tr><th>{escape(_title(name))}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    head = ("", "Accuracy", "By seed", "Frames", "Zooms", "Zooming", "Valid", "Event in a zoom")
    paper = ("Paper: LongVideoReason", "Paper: MLVU dev", "Paper: zooms, about")
    return _framed_table("All metrics", (*head, *paper), rows, f"Paper: {ablation['paper']}, 7B.")


def _framed_table(title: str, head: Sequence[str], rows: str, note: str) -> str:
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
    return line_chart(title, [line for line in series if line.points], x_label="step", as_percent=share)


def _mean_over_seeds(runs: Sequence[Rows], metric: str) -> list[tuple[float, float]]:
    by_step: defaultdict[float, list[float]] = defaultdict(list)
    for rows in runs:
        for row in rows:
            if metric in row:
                by_step[row[metric_names.STEP]].append(row[metric])
    return [(step, fmean(values)) for step, values in sorted(by_step.items())]
