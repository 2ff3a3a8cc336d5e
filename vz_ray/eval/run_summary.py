"""`summary.json`: metrics of a whole run, computed from the files of its stages.

Input, from the run directory: `eval/<stage>.jsonl` (stages `cold_start`, `rl`,
`sft_continued` and `uniform_<frames>`), `metrics.jsonl` and `stages.jsonl`.
Stages without a log are omitted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vz_ray.config.run import EvalConfig
from vz_ray.eval.bootstrap import ConfidenceInterval, paired_difference
from vz_ray.eval.eval_log import EvalResult, read_results
from vz_ray.eval.eval_metrics import EvalMetrics, accuracy_by_task, compute_eval_metrics
from vz_ray.eval.failure_counts import count_failures
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.monitoring.run_dir import stage_seconds
from vz_ray.utils.atomic_files import write_json

COLD_START, RL, SFT_CONTINUED, UNIFORM = "cold_start", "rl", "sft_continued", "uniform"
_UNIFORM_STAGE = re.compile(rf"{UNIFORM}_(\d+)")

Json = dict[str, Any]


def uniform_stage(frames: int) -> str:
    """Return the stage name of the uniform baseline with `frames` frames."""
    return f"{UNIFORM}_{frames}"


def eval_log_path(run_dir: Path, stage: str) -> Path:
    """Return the path of the per-sample log of a stage."""
    return run_dir / "eval" / f"{stage}.jsonl"


def _by_stage(evaluations: Mapping[str, EvalMetrics], name: str) -> Json:
    """Return one metric by stage; uniform baselines are nested by number of frames."""
    values: Json = {}
    uniform: Json = {}
    for stage, metrics in evaluations.items():
        value = getattr(metrics, name)
        value = value.mean if isinstance(value, ConfidenceInterval) else value
        if value is None:
            continue
        if match := _UNIFORM_STAGE.fullmatch(stage):
            uniform[match[1]] = value
        else:
            values[stage] = value
    if uniform:
        values[UNIFORM] = dict(sorted(uniform.items(), key=lambda item: int(item[0])))
    return values


def _baseline_frames(evaluations: Mapping[str, EvalMetrics]) -> int | None:
    """Return the smallest uniform frame count above the agent's mean, or the largest count."""
    counts = sorted(int(m[1]) for stage in evaluations if (m := _UNIFORM_STAGE.fullmatch(stage)))
    agent_frames = evaluations[RL].frames_mean if RL in evaluations else None
    if not counts or agent_frames is None:
        return None
    return next((count for count in counts if count > agent_frames), counts[-1])


def _gains(
    results: Mapping[str, Sequence[EvalResult]], baseline_frames: int | None, config: EvalConfig
) -> dict[str, Json]:
    """Return the gain in accuracy of RL over each baseline stage that has results, with intervals over videos."""
    if RL not in results:
        return {}
    accuracy = accuracy_by_task(results[RL])
    videos = {result.task.task_id: result.task.video for result in results[RL]}
    baselines = {"over_cold_start": COLD_START, "over_sft_continued": SFT_CONTINUED}
    if baseline_frames is not None:
        baselines["over_uniform"] = uniform_stage(baseline_frames)
    return {
        name: asdict(paired_difference(accuracy, accuracy_by_task(results[stage]), videos, config))
        for name, stage in baselines.items()
        if stage in results
    }


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def _training(rows: Sequence[Mapping[str, float]]) -> Json:
    """Summarize log-prob mismatch and weight publishes over the steps of `metrics.jsonl`."""
    logprob_max = _column(rows, metric_names.MISMATCH_LOGPROB_MAX)
    kl = _column(rows, metric_names.MISMATCH_KL)
    sync_seconds = _column(rows, metric_names.WEIGHT_SYNC_SECONDS)
    summary: Json = {}
    if logprob_max or kl:
        summary["mismatch"] = {
            "logprob_abs_max": max(logprob_max) if logprob_max else None,
            "kl": fmean(kl) if kl else None,
        }
    if sync_seconds:
        summary["weights"] = {"published": len(sync_seconds), "sync_seconds_median": median(sync_seconds)}
    return summary


def _reading(evaluations: Mapping[str, EvalMetrics], baseline_frames: int | None) -> Json:
    """Return the reading accuracy by stage, and the ratio of the uniform baseline to RL."""
    accuracies = _by_stage(evaluations, "reading_accuracy")
    rl, uniform = accuracies.get(RL), accuracies.get(UNIFORM, {}).get(str(baseline_frames))
    if rl and uniform is not None:
        accuracies["uniform_over_rl"] = uniform / rl
    return accuracies


def build_summary(run_dir: Path, config: EvalConfig | None = None) -> Json:
    """Build the summary of the run in `run_dir` as JSON values.

    Raises:
        ValueError: A log has a malformed line or an episode without a reward.
    """
    config = config or EvalConfig()
    logs = {path.stem: read_results(path) for path in sorted((run_dir / "eval").glob("*.jsonl"))}
    results = {stage: stage_results for stage, stage_results in logs.items() if stage_results}
    evaluations = {stage: compute_eval_metrics(stage_results, config) for stage, stage_results in results.items()}
    baseline_frames = _baseline_frames(evaluations)
    summary: Json = {
        "accuracy": _by_stage(evaluations, "accuracy"),
        "gain": _gains(results, baseline_frames, config),
    }
    if baseline_frames is not None:
        summary["uniform_baseline_frames"] = baseline_frames
    for name in ("frames_mean", "zooms_mean", "valid_zoom_rate", "event_coverage", "seconds_mean", "questions"):
        summary[name] = _by_stage(evaluations, name)
    summary["reading_accuracy"] = _reading(evaluations, baseline_frames)
    summary |= _training(read_metrics(run_dir / "metrics.jsonl"))
    summary["interval_level"] = config.confidence_level
    summary["wall_s"] = stage_seconds(run_dir)
    summary["failures"] = {stage: count_failures(stage_results) for stage, stage_results in results.items()}
    summary["evaluations"] = {stage: asdict(metrics) for stage, metrics in evaluations.items()}
    return summary


def write_summary(run_dir: Path, config: EvalConfig | None = None) -> Json:
    """Build the summary, write `summary.json` atomically, and return the summary."""
    summary = build_summary(run_dir, config)
    write_json(run_dir / "summary.json", summary)
    return summary
