"""HTML report of an ablation: `ablation.html` from `ablation.json` and the metrics of each variant."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from vz_ray.report.markup import bar, figure, format_number, format_percent, html_page, note, section, table
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
    body = note(_describe(ablation))
    if ablation["variants"]:
        results = _bars(ablation, "accuracy") + _bars(ablation, "zooms") + _claims(ablation) + _table(ablation)
        body += section("Results", results, "charts pair")
    else:
        body += "<p>No evaluation has finished yet.</p>"
    curves = "".join(_curve(metric, title, share, training) for metric, title, share in CURVES)
    body += section("Training, means over seeds", curves)
    return html_page(f"{name} · ablation", name, body)


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
    bars = ""
    for name, interval in intervals.items():
        low, high, mean = (100 * interval[end] / scale_max for end in ("low", "high", "mean"))
        value = format_percent(interval["mean"]) if share else format_number(interval["mean"], 2)
        bars += bar(_title(name), value, mean, color=VARIANT_COLORS[name], interval=(low, high))
    return figure("Accuracy on held-out questions" if share else "Zooms per question", bars)


def _claims(ablation: Json) -> str:
    """Render the paper's claims, the paired differences of this run, and whether they support the claims."""
    rows = []
    for claim in ablation["claims"]:
        scale, digits = (100, 1) if claim["metric"] == "accuracy" else (1, 2)
        low, high, mean = (f"{scale * claim['difference'][end]:+.{digits}f}" for end in ("low", "high", "mean"))
        seeds = " / ".join(f"{scale * value:+.{digits}f}" for value in claim["seeds"].values())
        title = f"{claim['metric']}: {variant_title(claim['greater'])} > {variant_title(claim['lesser'])}"
        rows.append((title, (mean, f"{low} to {high}", seeds, claim["questions"], claim["status"])))
    columns = ("The paper has", "Difference", "Interval", "By seed", "Questions", "Here")
    holds = "The paper's order holds." if ablation["order_holds"] else "The paper's order is not fully supported."
    return table("Paired differences (accuracy in points)", columns, rows, footnote=holds)


def _table(ablation: Json) -> str:
    columns: dict[str, Callable[[Json], str]] = {
        "Accuracy": lambda v: format_percent(v["accuracy"] and v["accuracy"]["mean"]),
        "By seed": lambda v: " / ".join(format_percent(run["accuracy"]) for run in v["seeds"].values()),
        "Frames": lambda v: format_number(v["frames_mean"]),
        "Zooms": lambda v: format_number(v["zooms"] and v["zooms"]["mean"], 2),
        "Zooming": lambda v: format_percent(v["zoom_call_rate"]),
        "Valid": lambda v: format_percent(v["valid_zoom_rate"]),
        "Event in a zoom": lambda v: format_percent(v["event_coverage"]),
        "Paper: LongVideoReason": lambda v: format_number(v["paper"]["accuracy"].get("longvideoreason/accuracy")),
        "Paper: MLVU dev": lambda v: format_number(v["paper"]["accuracy"].get("mlvu_dev/micro")),
        "Paper: zooms, about": lambda v: format_number(v["paper"]["zooms"], 0),
    }
    rows = [
        (_title(name), [cell(values) for cell in columns.values()]) for name, values in ablation["variants"].items()
    ]
    return table("All metrics", ("", *columns), rows, footnote=f"Paper: {ablation['paper']}, 7B.")


def _curve(metric: str, title: str, share: bool, training: Mapping[str, Sequence[Rows]]) -> str:
    series = [
        ChartSeries(_title(variant), _mean_over_seeds(runs, metric), color=VARIANT_COLORS[variant])
        for variant, runs in training.items()
    ]
    return line_chart(title, series, as_percent=share)


def _mean_over_seeds(runs: Sequence[Rows], metric: str) -> list[tuple[float, float]]:
    by_step: defaultdict[float, list[float]] = defaultdict(list)
    for rows in runs:
        for row in rows:
            if metric in row:
                by_step[row[metric_names.STEP]].append(row[metric])
    return [(step, fmean(values)) for step, values in sorted(by_step.items())]
