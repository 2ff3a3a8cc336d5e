"""Results of benchmarks: `benchmarks.json`, `benchmarks.csv` and one scored sample per line.

The JSON holds, by benchmark and mode: official metrics under strict and lenient
scoring, counts of answer statuses, and episode metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vz_ray.config.run import EvalConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import RewardParts
from vz_ray.eval.benchmarks import (
    AnswerScore,
    AnswerStatus,
    Benchmark,
    MissingVideos,
    ScoredResult,
    select_scores,
)
from vz_ray.eval.benchmarks.answer_scoring import EXCLUDED_STATUSES
from vz_ray.eval.eval_log import EvalResult
from vz_ray.eval.eval_metrics import compute_eval_metrics
from vz_ray.eval.eval_mode import EvalMode
from vz_ray.eval.paper_results import load_paper_results
from vz_ray.rewards import UNPARSED_NOTE
from vz_ray.utils.atomic_files import write_atomic, write_csv, write_json
from vz_ray.utils.json_lines import to_json_line

Json = dict[str, Any]

BENCHMARKS_JSON, BENCHMARKS_CSV, SAMPLES_DIR = "benchmarks.json", "benchmarks.csv", "samples"


@dataclass(frozen=True, slots=True)
class BenchmarkSelection:
    """A benchmark and the subset of its tasks to evaluate.

    Attributes:
        key: Name of the benchmark in the run.
        adapter: Name of the adapter that read the files, which is also the key of the paper's results.
        benchmark: The whole benchmark.
        tasks: Tasks to evaluate, after sampling and without missing videos.
        missing: Missing videos of the sampled tasks.
    """

    key: str
    adapter: str
    benchmark: Benchmark
    tasks: tuple[Task, ...]
    missing: MissingVideos


@dataclass(frozen=True, slots=True)
class BenchmarkResults:
    """Scored results of one benchmark by mode."""

    selection: BenchmarkSelection
    scores: Mapping[EvalMode, Sequence[ScoredResult]]


def build_benchmark_results(results: Sequence[BenchmarkResults], config: EvalConfig, models: Mapping[str, str]) -> Json:
    """Build the JSON values of a run; `models` maps labels to checkpoints, the run's own model first."""
    paper = load_paper_results()
    return {
        "models": dict(models),
        "interval_level": config.confidence_level,
        "paper": {"source": paper.source, "models": list(paper.models)},
        "benchmarks": {entry.selection.key: _benchmark(entry, config) for entry in results},
    }


def _benchmark(results: BenchmarkResults, config: EvalConfig) -> Json:
    selection = results.selection
    benchmark, missing = selection.benchmark, selection.missing
    return {
        "title": benchmark.title,
        "adapter": selection.adapter,
        "questions_released": benchmark.num_released,
        "questions_read": len(benchmark.tasks),
        "questions_evaluated": len(selection.tasks),
        "missing": {
            "videos": len(missing.paths),
            "total_videos": missing.num_videos,
            "questions": missing.num_questions,
            "paths": list(missing.paths),
        },
        "notes": list(benchmark.notes),
        "modes": {str(mode): _mode(results, scored, config) for mode, scored in results.scores.items()},
    }


def _mode(results: BenchmarkResults, scored: Sequence[ScoredResult], config: EvalConfig) -> Json:
    benchmark = results.selection.benchmark
    strict = benchmark.compute_metrics(select_scores(scored, lambda result: result.strict))
    lenient = {
        (metric.table, metric.name): metric.value
        for metric in benchmark.compute_metrics(select_scores(scored, lambda result: result.lenient))
    }
    paper = load_paper_results()
    return {
        "scores": [
            {
                "table": metric.table,
                "name": metric.name,
                "strict": metric.value,
                "lenient": lenient[metric.table, metric.name],
                "count": metric.count,
                "scale": metric.scale,
                "paper": dict(paper.values_by_model(results.selection.adapter, _path(metric.table, metric.name))),
            }
            for metric in strict
        ],
        "answer_status": {
            "strict": _count_statuses(result.strict for result in scored),
            "lenient": _count_statuses(result.lenient for result in scored),
        },
        "metrics": asdict(compute_eval_metrics([with_strict_score(result) for result in scored], config)),
    }


def _path(table: str, name: str) -> str:
    return f"{table}/{name}" if table else name


def _count_statuses(scores: Iterator[AnswerScore]) -> dict[str, int]:
    counts = Counter(score.status for score in scores)
    return {status.value: counts[status] for status in AnswerStatus}


def with_strict_score(scored: ScoredResult) -> EvalResult:
    """Return the result with its reward's accuracy replaced by the strict score."""
    score, trajectory = scored.strict, scored.result.trajectory
    reward = trajectory.reward or RewardParts(0.0, 0.0, 0.0, 0.0)
    notes = {AnswerStatus.UNPARSED: UNPARSED_NOTE, AnswerStatus.PARSED: ""}
    reward = replace(
        reward,
        accuracy=score.score,
        valid=score.status not in EXCLUDED_STATUSES,
        note=notes.get(score.status, score.status.value),
    )
    return replace(scored.result, trajectory=replace(trajectory, reward=reward))


# -- files ------------------------------------------------------------------------


def write_benchmark_results(run_dir: Path, report: Json) -> None:
    """Write `benchmarks.json` and `benchmarks.csv`, each atomically."""
    write_json(run_dir / BENCHMARKS_JSON, report)
    write_csv(run_dir / BENCHMARKS_CSV, list(_rows(report)))


def _rows(report: Json) -> Iterator[Json]:
    """Yield one row per official metric, in percent or grades; episode metrics repeat in every row."""
    for key, benchmark in report["benchmarks"].items():
        for mode, mode_results in benchmark["modes"].items():
            metrics, statuses = mode_results["metrics"], mode_results["answer_status"]["strict"]
            for score in mode_results["scores"]:
                yield {
                    "benchmark": key,
                    "mode": mode,
                    "table": score["table"],
                    "metric": score["name"],
                    **{name: scale_value(score[name], score["scale"]) for name in ("strict", "lenient")},
                    **{model: score["paper"].get(model) for model in report["paper"]["models"]},
                    "count": score["count"],
                    "questions_evaluated": benchmark["questions_evaluated"],
                    "frames_mean": metrics["frames_mean"],
                    "frames_p95": metrics["frames_p95"],
                    "zooms_mean": metrics["zooms_mean"],
                    "valid_zoom_rate": metrics["valid_zoom_rate"],
                    "zoom_hit_rate": metrics["event_coverage"],
                    "seconds_mean": metrics["seconds_mean"],
                    **{status.value: statuses[status.value] for status in AnswerStatus},
                    "missing_questions": benchmark["missing"]["questions"],
                }


def scale_value(value: float | None, scale: float) -> float | None:
    """Scale a value for display."""
    return None if value is None else value * scale


def write_samples(run_dir: Path, results: BenchmarkResults) -> None:
    """Write `samples/<benchmark>/<mode>.jsonl`: one line per question with its scores and costs."""
    for mode, scored in results.scores.items():
        path = run_dir / SAMPLES_DIR / results.selection.key / f"{mode.stage}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(to_json_line(_sample(result)) for result in scored).encode())


def _sample(scored: ScoredResult) -> Json:
    task, trajectory = scored.task, scored.result.trajectory
    return {
        "task": task.task_id,
        "kind": task.kind,
        "video": task.video,
        "reference": task.answer,
        "strict": _score(scored.strict),
        "lenient": _score(scored.lenient),
        "status": trajectory.status.value,
        "last_turn": trajectory.turns[-1].text if trajectory.turns else "",
        "frames": len(trajectory.frame_refs),
        "zooms": len(trajectory.zooms),
        "zoom_calls": trajectory.num_zoom_calls,
        "seconds": trajectory.seconds,
        "error": trajectory.error,
    }


def _score(score: AnswerScore) -> Json:
    return {
        "status": score.status.value,
        "score": score.score,
        "answer": score.answer,
        "detail": dict(score.detail),
    }
