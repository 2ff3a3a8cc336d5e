"""`summary.json`: the figures of a whole run, from what its stages left on disk.

Read from the run directory: `eval/<stage>.jsonl` (stages `cold_start`, `rl`,
`sft_continued`, and `uniform_<frames>`), `metrics.jsonl` and `stages.jsonl`. A
stage that has not run is left out, never filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vz_ray.config.eval import EvalConfig
from vz_ray.eval.bootstrap import ConfidenceInterval, paired_difference
from vz_ray.eval.eval_log import EvalResult, read_results
from vz_ray.eval.eval_metrics import EvalMetrics, accuracy_by_task, compute_eval_metrics
from vz_ray.eval.failure_counts import count_failures
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.monitoring.stage_times import stage_seconds
from vz_ray.utils.atomic_files import write_atomic

COLD_START, RL, SFT_CONTINUED, UNIFORM = "cold_start", "rl", "sft_continued", "uniform"
_UNIFORM_STAGE = re.compile(rf"{UNIFORM}_(\d+)")

Json = dict[str, Any]


def uniform_stage(frames: int) -> str:
    """Stage name of the uniform baseline at `frames` frames."""
    return f"{UNIFORM}_{frames}"


def eval_log_path(run_dir: Path, stage: str) -> Path:
    """Where a stage's per-sample log lies."""
    return run_dir / "eval" / f"{stage}.jsonl"


def _by_stage(figures: Mapping[str, EvalMetrics], name: str) -> Json:
    """One figure of every stage, the uniform ones by number of frames."""
    found: Json = {}
    for stage, metrics in figures.items():
        value = getattr(metrics, name)
        value = value.mean if isinstance(value, ConfidenceInterval) else value
        match = _UNIFORM_STAGE.fullmatch(stage)
        if value is None:
            continue
        if match:
            found.setdefault(UNIFORM, {})[match[1]] = value
        else:
            found[stage] = value
    if UNIFORM in found:
        found[UNIFORM] = dict(sorted(found[UNIFORM].items(), key=lambda item: int(item[0])))
    return found


def _opponent(figures: Mapping[str, EvalMetrics]) -> int | None:
    """The uniform frame count next above what the agent sees on average, or the largest."""
    frames = sorted(int(m[1]) for stage in figures if (m := _UNIFORM_STAGE.fullmatch(stage)))
    seen = figures[RL].frames_mean if RL in figures else None
    if not frames or seen is None:
        return None
    return next((count for count in frames if count > seen), frames[-1])


def _gain(ours: Sequence[EvalResult], theirs: Sequence[EvalResult], config: EvalConfig) -> ConfidenceInterval:
    """Paired difference in accuracy, with an interval over videos."""
    return paired_difference(
        accuracy_by_task(ours),
        accuracy_by_task(theirs),
        {result.task.task_id: result.task.video for result in ours},
        num_resamples=config.bootstrap_resamples,
        confidence_level=config.confidence_level,
        seed=config.seed,
    )


def _gains(
    results: Mapping[str, Sequence[EvalResult]], opponent: int | None, config: EvalConfig
) -> dict[str, Json]:
    """What RL gained over each of the others that ran."""
    others = {"over_cold_start": COLD_START, "over_sft_continued": SFT_CONTINUED}
    if opponent is not None:
        others["over_uniform"] = uniform_stage(opponent)
    return {
        name: asdict(_gain(results[RL], results[stage], config))
        for name, stage in others.items()
        if RL in results and stage in results
    }


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def _training(rows: Sequence[Mapping[str, float]]) -> Json:
    """Mismatch with the engine and weight publishes, over the steps of `metrics.jsonl`."""
    largest, kl = _column(rows, metric_names.MISMATCH_LOGPROB_MAX), _column(rows, metric_names.MISMATCH_KL)
    syncs = _column(rows, metric_names.WEIGHT_SYNC_SECONDS)
    found: Json = {}
    if largest or kl:
        found["mismatch"] = {
            "logprob_abs_max": max(largest) if largest else None,
            "kl": fmean(kl) if kl else None,
        }
    if syncs:
        found["weights"] = {"published": len(syncs), "sync_s_median": median(syncs)}
    return found


def _reading(figures: Mapping[str, EvalMetrics], opponent: int | None) -> Json:
    """Accuracy given that every event was in the frames, and the uniform model's over the agent's."""
    found = _by_stage(figures, "reading_accuracy")
    ours, theirs = found.get(RL), found.get(UNIFORM, {}).get(str(opponent))
    if ours and theirs is not None:
        found["uniform_over_rl"] = theirs / ours
    return found


def build_summary(run_dir: Path, config: EvalConfig | None = None) -> Json:
    """The summary of the run in `run_dir`, as JSON values.

    Raises:
        ValueError: A log is broken, or holds an episode that was never scored.
    """
    config = config or EvalConfig()
    results = {path.stem: read_results(path) for path in sorted((run_dir / "eval").glob("*.jsonl"))}
    results = {stage: found for stage, found in results.items() if found}
    figures = {stage: compute_eval_metrics(found, config) for stage, found in results.items()}
    opponent = _opponent(figures)
    summary: Json = {"accuracy": _by_stage(figures, "accuracy"), "gain": _gains(results, opponent, config)}
    if opponent is not None:
        summary["uniform_baseline_frames"] = opponent
    for name in (
        "frames_mean",
        "zooms_mean",
        "valid_zoom_rate",
        "event_coverage",
        "seconds_mean",
        "questions",
    ):
        summary[name] = _by_stage(figures, name)
    summary["reading_accuracy"] = _reading(figures, opponent)
    summary |= _training(read_metrics(run_dir / "metrics.jsonl"))
    summary["interval_level"] = config.confidence_level
    summary["wall_s"] = stage_seconds(run_dir)
    summary["failures"] = {stage: count_failures(found) for stage, found in results.items()}
    summary["evaluations"] = {stage: metrics.to_dict() for stage, metrics in figures.items()}
    return summary


def write_summary(run_dir: Path, config: EvalConfig | None = None) -> Json:
    """Builds the summary, writes `summary.json` whole or not at all, and returns it."""
    summary = build_summary(run_dir, config)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(run_dir / "summary.json", text.encode())
    return summary
