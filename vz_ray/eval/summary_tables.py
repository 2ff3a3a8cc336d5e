"""Terminal tables of `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vz_ray.env.failure_modes import FailureMode
from vz_ray.eval.tables import number_cell, percent_cell
from vz_ray.utils.console import make_console
from vz_ray.utils.durations import format_duration

SUMMARY_WIDTH = 110
"""Minimum width in columns if the output is not a terminal."""

_TITLES = {"cold_start": "after cold start", "sft_continued": "SFT continued", "rl": "after RL"}


COMPARED_METRICS = (
    "accuracy.cold_start",
    "accuracy.sft_continued",
    "accuracy.rl",
    "accuracy.uniform.8",
    "accuracy.uniform.16",
    "accuracy.uniform.32",
    "accuracy.uniform.64",
    "accuracy.uniform.128",
    "gain.over_cold_start.mean",
    "gain.over_sft_continued.mean",
    "gain.over_uniform.mean",
    "uniform_baseline_frames",
    "reading_accuracy.rl",
    "reading_accuracy.uniform_over_rl",
    "frames_mean.rl",
    "zooms_mean.rl",
    "valid_zoom_rate.rl",
    "event_coverage.rl",
    "mismatch.logprob_abs_max",
    "mismatch.kl",
    "weights.sync_seconds_median",
    "wall_s.total",
)
"""Metrics of `summary.json` for comparing runs, as dotted key paths."""


def lookup_metric(summary: Mapping[str, Any], path: str) -> float | None:
    """Return the number at a dotted key path, or None if it is missing."""
    value: Any = summary
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def runs_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with one column per run and a median column; metrics without values are omitted."""
    table = Table("", pad_edge=False, box=SIMPLE)
    for name in (*summaries, "median"):
        table.add_column(name, justify="right", style="bold" if name == "median" else None)
    for path in COMPARED_METRICS:
        values = [lookup_metric(summary, path) for summary in summaries.values()]
        present = [value for value in values if value is not None]
        if present:
            row = [*values, median(present)]
            table.add_row(path, *("-" if value is None else f"{value:.4g}" for value in row))
    return table


def stage_title(stage: str) -> str:
    """Return the display name of a stage."""
    if stage.startswith("uniform_"):
        return f"uniform, {stage.removeprefix('uniform_')} frames"
    return _TITLES.get(stage, stage.replace("_", " "))


def _order(stage: str) -> tuple[int, int, str]:
    """Sort key: agent stages in run order, then uniform baselines by frames, then other stages."""
    if stage in _TITLES:
        return (0, list(_TITLES).index(stage), stage)
    frames = stage.removeprefix("uniform_")
    return (1, int(frames), stage) if stage.startswith("uniform_") and frames.isdigit() else (2, 0, stage)


def evaluations_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with one row per evaluation, from `evaluations` of `summary.json`."""
    table = Table(title="Evaluation", title_justify="left", pad_edge=False, box=SIMPLE)
    table.add_column("", no_wrap=True)
    headings = ("accuracy %", "95% CI", "reading %", "frames", "zooms", "valid %", "coverage %", "s", "n")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in sorted(evaluations, key=_order):
        row = evaluations[stage]
        accuracy = row["accuracy"]
        table.add_row(
            stage_title(stage),
            percent_cell(accuracy and accuracy["mean"]),
            f"{percent_cell(accuracy['low'])}-{percent_cell(accuracy['high'])}" if accuracy else "-",
            percent_cell(row["reading_accuracy"]),
            number_cell(row["frames_mean"]),
            number_cell(row["zooms_mean"], 2),
            percent_cell(row["valid_zoom_rate"]),
            percent_cell(row["event_coverage"]),
            number_cell(row["seconds_mean"], 2),
            str(row["questions"]) + (f" (+{row['invalid']} invalid)" if row["invalid"] else ""),
        )
    return table


def failures_table(failures: Mapping[str, Mapping[str, int]], evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return failure modes by agent evaluation, in percent of its episodes and as counts."""
    stages = [s for s in sorted(failures, key=_order) if not s.startswith("uniform_")]
    table = Table(title="Failure modes, %", title_justify="left", pad_edge=False, box=SIMPLE)
    table.add_column("", no_wrap=True)
    for stage in stages:
        table.add_column(stage_title(stage), justify="right", no_wrap=True)
    episodes = {s: evaluations[s]["questions"] + evaluations[s]["invalid"] for s in stages}
    for failure in FailureMode:
        counts = {stage: failures[stage].get(failure, 0) for stage in stages}
        if any(counts.values()):
            cells = (f"{percent_cell(count / episodes[s])} ({count})" for s, count in counts.items())
            table.add_row(failure.replace("_", " "), *cells)
    return table


def times_table(wall_s: Mapping[str, float]) -> Table:
    """Return a table with one row per stage, from `wall_s` of `summary.json`."""
    table = Table(title="Time", title_justify="left", pad_edge=False)
    table.add_column("")
    table.add_column("wall", justify="right")
    for stage, seconds in wall_s.items():
        table.add_row(stage_title(stage), format_duration(seconds), style="bold" if stage == "total" else None)
    return table


def _gain_lines(summary: Mapping[str, Any]) -> list[str]:
    frames = summary.get("uniform_baseline_frames")
    baselines = {
        "over_cold_start": "the cold start",
        "over_sft_continued": "SFT continued",
        "over_uniform": f"uniform at {frames} frames",
    }
    lines = []
    for name, gain in summary["gain"].items():
        low, high = 100 * gain["low"], 100 * gain["high"]
        lines.append(f"RL over {baselines[name]}: {100 * gain['mean']:+.1f} points ({low:+.1f} to {high:+.1f})")
    return lines


def _invalid_lines(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the reasons for excluded questions, one line per evaluation."""
    return [
        f"{stage_title(stage)}: excluded {', '.join(f'{n} ({reason})' for reason, n in reasons.items())}"
        for stage, row in evaluations.items()
        if (reasons := row["invalid_reasons"])
    ]


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the summary of a run: evaluations, failure modes, gains, training health, wall times."""
    console = make_console(SUMMARY_WIDTH, console)
    console.print(evaluations_table(summary["evaluations"]))
    failures = failures_table(summary["failures"], summary["evaluations"])
    if failures.row_count:
        console.print(failures)
    lines = _gain_lines(summary) + _invalid_lines(summary["evaluations"])
    if mismatch := summary.get("mismatch"):
        parts = [f"{name} {value:.2g}" for name, value in mismatch.items() if value is not None]
        lines.append(f"engine-learner mismatch: {', '.join(parts)}")
    if weights := summary.get("weights"):
        lines.append(f"published weights {weights['published']} times, median {weights['sync_seconds_median']:.3f} s")
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if summary["wall_s"]:
        console.print(times_table(summary["wall_s"]))
