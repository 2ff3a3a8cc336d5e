"""What came out of playing benchmarks: `benchmarks.json`, `benchmarks.csv` and a log of marks per question.

In the JSON, by benchmark and mode: official figures read strictly and
leniently, how far answers got, and what an episode cost.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vz_ray.config.eval import EvalConfig
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
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.json_lines import to_json_line

Json = dict[str, Any]

BENCHMARKS_JSON, BENCHMARKS_CSV, SAMPLES_DIR = "benchmarks.json", "benchmarks.csv", "samples"


@dataclass(frozen=True, slots=True)
class BenchmarkResults:
    """One benchmark with the questions that were to be played.

    Attributes:
        key: Its name in the run.
        adapter: What read it; the paper's numbers are looked up by this.
        benchmark: What was read.
        num_questions: Questions to be played, after sampling and without those whose videos are missing.
        missing_videos: Videos that are not there; their questions are not among those.
        scores: By mode, what every question that was played is worth.
    """

    key: str
    adapter: str
    benchmark: Benchmark
    num_questions: int
    missing_videos: MissingVideos
    scores: Mapping[EvalMode, Sequence[ScoredResult]]


def build_benchmark_results(
    played: Sequence[BenchmarkResults], config: EvalConfig, models: Mapping[str, str]
) -> Json:
    """All figures of a run, as JSON values; `models` are checkpoints by label, the run's own first."""
    return {
        "models": dict(models),
        "interval_level": config.confidence_level,
        "paper": {"source": load_paper_results().source, "shown": list(load_paper_results().shown)},
        "benchmarks": {one.key: _benchmark(one, config) for one in played},
    }


def _benchmark(one: BenchmarkResults, config: EvalConfig) -> Json:
    return {
        "title": one.benchmark.title,
        "adapter": one.adapter,
        "released": one.benchmark.num_released,
        "read": len(one.benchmark.tasks),
        "asked": one.num_questions,
        "missing": {
            "videos": len(one.missing_videos.paths),
            "of": one.missing_videos.num_videos,
            "questions": one.missing_videos.num_questions,
            "paths": list(one.missing_videos.paths),
        },
        "notes": list(one.benchmark.notes),
        "modes": {str(mode): _mode(one, marked, config) for mode, marked in one.scores.items()},
    }


def _mode(one: BenchmarkResults, marked: Sequence[ScoredResult], config: EvalConfig) -> Json:
    strict = one.benchmark.compute_metrics(select_scores(marked, lambda sample: sample.strict))
    lenient = {
        (figure.table, figure.name): figure.value
        for figure in one.benchmark.compute_metrics(select_scores(marked, lambda sample: sample.lenient))
    }
    return {
        "figures": [
            {
                "table": figure.table,
                "name": figure.name,
                "strict": figure.value,
                "lenient": lenient[figure.table, figure.name],
                "count": figure.count,
                "scale": figure.scale,
                "paper": dict(load_paper_results().models_for(one.adapter, _path(figure.table, figure.name))),
            }
            for figure in strict
        ],
        "readings": {
            "strict": _readings(sample.strict for sample in marked),
            "lenient": _readings(sample.lenient for sample in marked),
        },
        "metrics": compute_eval_metrics([with_strict_score(sample) for sample in marked], config).to_dict(),
    }


def _path(table: str, name: str) -> str:
    return f"{table}/{name}" if table else name


def _readings(marks: Iterator[AnswerScore]) -> dict[str, int]:
    counts = Counter(mark.status for mark in marks)
    return {reading.value: counts[reading] for reading in AnswerStatus}


def with_strict_score(sample: ScoredResult) -> EvalResult:
    """The result with its strict mark in place of the reward it was played for."""
    mark, played = sample.strict, sample.result.trajectory
    before = played.reward or RewardParts(0.0, 0.0, 0.0, 0.0)
    note = {AnswerStatus.UNPARSED: UNPARSED_NOTE, AnswerStatus.PARSED: ""}.get(mark.status, mark.status.value)
    reward = replace(before, accuracy=mark.score, valid=mark.status not in EXCLUDED_STATUSES, note=note)
    return replace(sample.result, trajectory=replace(played, reward=reward))


# -- files ------------------------------------------------------------------------


def write_benchmark_results(run: Path, found: Json) -> None:
    """Writes `benchmarks.json` and `benchmarks.csv`, each whole or not at all."""
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(run / BENCHMARKS_JSON, text.encode())
    file = io.StringIO(newline="")
    rows = list(_rows(found))
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(run / BENCHMARKS_CSV, file.getvalue().encode())


def _rows(found: Json) -> Iterator[Json]:
    """One row per figure, costs repeated; shares and figures as shown, in per cent or grades."""
    for key, benchmark in found["benchmarks"].items():
        for mode, played in benchmark["modes"].items():
            cost, readings = played["metrics"], played["readings"]["strict"]
            for figure in played["figures"]:
                yield {
                    "benchmark": key,
                    "mode": mode,
                    "table": figure["table"],
                    "figure": figure["name"],
                    **{name: scale_value(figure[name], figure["scale"]) for name in ("strict", "lenient")},
                    **{model: figure["paper"].get(model) for model in found["paper"]["shown"]},
                    "count": figure["count"],
                    "asked": benchmark["asked"],
                    "frames_mean": cost["frames_mean"],
                    "frames_p95": cost["frames_p95"],
                    "zooms_mean": cost["zooms_mean"],
                    "valid_zoom_rate": cost["valid_zoom_rate"],
                    "zoom_hit_rate": cost["event_coverage"],
                    "seconds_mean": cost["seconds_mean"],
                    **{reading.value: readings[reading.value] for reading in AnswerStatus},
                    "missing_questions": benchmark["missing"]["questions"],
                }


def scale_value(value: float | None, scale: float) -> float | None:
    """A figure as tables have it."""
    return None if value is None else value * scale


def write_samples(run: Path, one: BenchmarkResults) -> None:
    """`samples/<benchmark>/<mode>.jsonl`: a line per question with its marks, both readings, and its cost."""
    for mode, marked in one.scores.items():
        path = run / SAMPLES_DIR / one.key / f"{mode.stage}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(to_json_line(_sample(sample)) for sample in marked).encode())


def _sample(sample: ScoredResult) -> Json:
    task, played = sample.task, sample.result.trajectory
    return {
        "task": task.task_id,
        "kind": task.kind,
        "video": task.video,
        "truth": task.answer,
        "strict": _mark(sample.strict),
        "lenient": _mark(sample.lenient),
        "status": played.status.value,
        "said": played.turns[-1].text if played.turns else "",
        "frames": len(played.frame_refs),
        "zooms": len(played.zooms),
        "zooms_tried": played.num_zoom_calls,
        "seconds": played.seconds,
        "error": played.error,
    }


def _mark(mark: AnswerScore) -> Json:
    return {
        "reading": mark.status.value,
        "score": mark.score,
        "answer": mark.answer,
        "detail": dict(mark.detail),
    }
