"""Figures as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vz_ray.env.failure_modes import FailureMode
from vz_ray.utils.durations import format_duration

SUMMARY_WIDTH = 110
"""Columns where the output is a file and has no width of its own."""

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
    "weights.sync_s_median",
    "wall_s.total",
)
"""Figures of `summary.json` that runs are compared by, as paths of keys."""


def lookup_metric(summary: Mapping[str, Any], path: str) -> float | None:
    """The number at a path of keys; None where a run has none."""
    found: Any = summary
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def runs_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per run and one of medians; figures that no run has are left out."""
    table = Table("", pad_edge=False, box=SIMPLE)
    for name in (*summaries, "median"):
        table.add_column(name, justify="right", style="bold" if name == "median" else None)
    for path in COMPARED_METRICS:
        values = [lookup_metric(summary, path) for summary in summaries.values()]
        known = [value for value in values if value is not None]
        if known:
            row = [*values, median(known)]
            table.add_row(path, *("-" if value is None else f"{value:.4g}" for value in row))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _plain(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def stage_title(stage: str) -> str:
    """A stage's name for people."""
    if stage.startswith("uniform_"):
        return f"uniform, {stage.removeprefix('uniform_')} frames"
    return _TITLES.get(stage, stage.replace("_", " "))


def _order(stage: str) -> tuple[int, int, str]:
    """Agent stages as they run, then the uniform ones by frames, then the rest."""
    if stage in _TITLES:
        return (0, list(_TITLES).index(stage), stage)
    frames = stage.removeprefix("uniform_")
    return (1, int(frames), stage) if stage.startswith("uniform_") and frames.isdigit() else (2, 0, stage)


def evaluations_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per evaluation, from `evaluations` of `summary.json`."""
    table = Table(title="Evaluation", title_justify="left", pad_edge=False, box=SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in ("right %", "95% interval", "reads %", "frames", "zooms", "valid %", "seen %", "s", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in sorted(evaluations, key=_order):
        row = evaluations[stage]
        accuracy = row["accuracy"]
        table.add_row(
            stage_title(stage),
            _percent(accuracy and accuracy["mean"]),
            f"{_percent(accuracy['low'])}-{_percent(accuracy['high'])}" if accuracy else "-",
            _percent(row["reading_accuracy"]),
            _plain(row["frames_mean"]),
            _plain(row["zooms_mean"], 2),
            _percent(row["valid_zoom_rate"]),
            _percent(row["event_coverage"]),
            _plain(row["seconds_mean"], 2),
            str(row["questions"]) + (f" (+{row['invalid']} invalid)" if row["invalid"] else ""),
        )
    return table


def failures_table(
    failures: Mapping[str, Mapping[str, int]], evaluations: Mapping[str, Mapping[str, Any]]
) -> Table:
    """What went wrong, one column per evaluation of the agent, in percent of its episodes (and how many)."""
    stages = [s for s in sorted(failures, key=_order) if not s.startswith("uniform_")]
    table = Table(title="What went wrong, %", title_justify="left", pad_edge=False, box=SIMPLE)
    table.add_column("", no_wrap=True)
    for stage in stages:
        table.add_column(stage_title(stage), justify="right", no_wrap=True)
    played = {s: evaluations[s]["questions"] + evaluations[s]["invalid"] for s in stages}
    for failure in FailureMode:
        counts = {stage: failures[stage].get(failure, 0) for stage in stages}
        if any(counts.values()):
            cells = (f"{_percent(count / played[s])} ({count})" for s, count in counts.items())
            table.add_row(failure.replace("_", " "), *cells)
    return table


def times_table(wall_s: Mapping[str, float]) -> Table:
    """One row per stage, from `wall_s` of `summary.json`."""
    table = Table(title="Time", title_justify="left", pad_edge=False)
    table.add_column("")
    table.add_column("wall", justify="right")
    for stage, seconds in wall_s.items():
        table.add_row(
            stage_title(stage), format_duration(seconds), style="bold" if stage == "total" else None
        )
    return table


def _gain_lines(summary: Mapping[str, Any]) -> list[str]:
    frames = summary.get("uniform_baseline_frames")
    others = {
        "over_cold_start": "the cold start",
        "over_sft_continued": "SFT continued",
        "over_uniform": f"uniform at {frames} frames",
    }
    lines = []
    for name, gain in summary["gain"].items():
        low, high = 100 * gain["low"], 100 * gain["high"]
        lines.append(f"RL over {others[name]}: {100 * gain['mean']:+.1f} points ({low:+.1f} to {high:+.1f})")
    return lines


def _invalid_lines(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why questions were left out, by evaluation."""
    return [
        f"{stage_title(stage)}: left out {', '.join(f'{count} ({why})' for why, count in reasons.items())}"
        for stage, row in evaluations.items()
        if (reasons := row["invalid_reasons"])
    ]


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """The final table of a run: evaluations, gains, health of the training, time."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, SUMMARY_WIDTH)
    console.print(evaluations_table(summary["evaluations"]))
    failures = failures_table(summary["failures"], summary["evaluations"])
    if failures.row_count:
        console.print(failures)
    lines = _gain_lines(summary) + _invalid_lines(summary["evaluations"])
    if mismatch := summary.get("mismatch"):
        parts = [f"{name} {value:.2g}" for name, value in mismatch.items() if value is not None]
        lines.append(f"engine against learner: {', '.join(parts)}")
    if weights := summary.get("weights"):
        lines.append(
            f"weights published {weights['published']} times, median {weights['sync_s_median']:.3f} s"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if summary["wall_s"]:
        console.print(times_table(summary["wall_s"]))
