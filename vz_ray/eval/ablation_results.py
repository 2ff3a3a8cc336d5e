"""Results of an ablation: metrics of every variant and paired differences between variants.

Differences are paired by question, and by seed: both trainings of a pair start from the
same cold start. Intervals resample seeds and whole videos (`bootstrap.crossed_bootstrap`).
A claim is inconclusive if the interval of its difference contains 0. The paper's order
holds if every claim is supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from vz_ray.config.ablation import (
    FULL,
    VARIANTS,
    WITHOUT_COLD_START,
    WITHOUT_REFLECTION,
    WITHOUT_RL,
    WITHOUT_TOOL_REWARD,
)
from vz_ray.config.run import EvalConfig
from vz_ray.eval.bootstrap import ConfidenceInterval, common_differences, crossed_bootstrap
from vz_ray.eval.eval_log import EvalResult
from vz_ray.eval.eval_metrics import EvalMetrics, accuracy_by_task, compute_eval_metrics, reward_parts_of
from vz_ray.eval.paper_results import load_paper_results
from vz_ray.utils.atomic_files import write_csv, write_json

Json = dict[str, Any]
ResultsByVariant = Mapping[str, Mapping[int, Sequence[EvalResult]]]
"""Results by variant and seed."""

ABLATION_JSON, ABLATION_CSV, ABLATION_MARKDOWN = "ablation.json", "ablation.csv", "ablation.md"
ACCURACY, ZOOMS = "accuracy", "zooms"

PAPER_MODEL_NAMES = {
    FULL: "VideoZoomer 7B",
    WITHOUT_RL: "without RL",
    WITHOUT_COLD_START: "without cold start",
    WITHOUT_REFLECTION: "without reflection",
    WITHOUT_TOOL_REWARD: "without tool reward",
}
"""Name of each variant in `paper_results.yaml`."""


class ClaimStatus(StrEnum):
    SUPPORTED = "supported"
    INCONCLUSIVE = "inconclusive"
    REVERSED = "reversed"


def claim_status(difference: ConfidenceInterval) -> ClaimStatus:
    """Return the status of the claim that `difference` is positive."""
    if difference.low > 0:
        return ClaimStatus.SUPPORTED
    return ClaimStatus.REVERSED if difference.high < 0 else ClaimStatus.INCONCLUSIVE


@dataclass(frozen=True, slots=True)
class AblationClaim:
    """A claim of the paper: `metric` of variant `greater` exceeds `metric` of variant `lesser`."""

    metric: str
    greater: str
    lesser: str


CLAIMS = (
    *(AblationClaim(ACCURACY, FULL, variant) for variant in reversed(VARIANTS) if variant != FULL),
    AblationClaim(ZOOMS, FULL, WITHOUT_REFLECTION),
    AblationClaim(ZOOMS, WITHOUT_REFLECTION, WITHOUT_TOOL_REWARD),
)


def zooms_by_task(results: Sequence[EvalResult]) -> dict[str, float]:
    """Return the number of successful zooms of each valid episode, by task id."""
    return {r.task.task_id: float(len(r.trajectory.zooms)) for r in results if reward_parts_of(r).valid}


_METRICS: Mapping[str, Callable[[Sequence[EvalResult]], dict[str, float]]] = {
    ACCURACY: accuracy_by_task,
    ZOOMS: zooms_by_task,
}


def build_ablation_results(results: ResultsByVariant, config: EvalConfig) -> Json:
    """Build the JSON values of an ablation; variants and seeds without results are omitted."""
    videos = {r.task.task_id: r.task.video for runs in results.values() for run in runs.values() for r in run}
    interval = partial(crossed_bootstrap, clusters=videos, config=config)
    variants = {name: results[name] for name in VARIANTS if results.get(name)}
    claims = [
        _claim(claim, variants[claim.greater], variants[claim.lesser], interval)
        for claim in CLAIMS
        if variants.get(claim.greater, {}).keys() & variants.get(claim.lesser, {}).keys()
    ]
    tasks = {r.task.task_id for run in variants.get(FULL, {}).values() for r in run}
    all_supported = all(claim["status"] == ClaimStatus.SUPPORTED for claim in claims)
    return {
        "seeds": sorted({seed for runs in variants.values() for seed in runs}),
        "questions": len(tasks),
        "videos": len({videos[task] for task in tasks}),
        "interval_level": config.confidence_level,
        "paper": load_paper_results().source,
        "variants": {name: _variant(name, runs, config, interval) for name, runs in variants.items()},
        "claims": claims,
        "order_holds": len(claims) == len(CLAIMS) and all_supported,
    }


def _variant(
    name: str,
    runs: Mapping[int, Sequence[EvalResult]],
    config: EvalConfig,
    interval: Callable[..., ConfidenceInterval],
) -> Json:
    pooled = compute_eval_metrics([result for run in runs.values() for result in run], config)
    values_by_run = {metric: [compute(run) for run in runs.values()] for metric, compute in _METRICS.items()}
    paper, paper_name = load_paper_results(), PAPER_MODEL_NAMES[name]
    return {
        **{metric: asdict(interval(values)) if all(values) else None for metric, values in values_by_run.items()},
        **_costs(pooled),
        "seeds": {str(seed): _run(compute_eval_metrics(run, config)) for seed, run in sorted(runs.items())},
        "paper": {
            "zooms": paper.mean_zooms.get(paper_name),
            "accuracy": {
                f"{benchmark}/{metric}": values[paper_name]
                for benchmark, metrics in paper.metrics.items()
                for metric, values in metrics.items()
                if paper_name in values and PAPER_MODEL_NAMES[WITHOUT_RL] in values
            },
        },
    }


def _run(metrics: EvalMetrics) -> Json:
    """Return the metrics of one seed."""
    accuracy = metrics.accuracy.mean if metrics.accuracy else None
    return {"accuracy": accuracy, "zooms": metrics.zooms_mean, **_costs(metrics)}


def _costs(metrics: EvalMetrics) -> Json:
    names = ("questions", "invalid", "frames_mean", "zoom_call_rate", "valid_zoom_rate", "event_coverage")
    return {name: getattr(metrics, name) for name in names}


def _claim(
    claim: AblationClaim,
    greater: Mapping[int, Sequence[EvalResult]],
    lesser: Mapping[int, Sequence[EvalResult]],
    interval: Callable[..., ConfidenceInterval],
) -> Json:
    """Return a claim with its paired difference, the difference by seed, and its status."""
    compute = _METRICS[claim.metric]
    seeds = sorted(greater.keys() & lesser.keys())
    by_seed = {seed: common_differences(compute(greater[seed]), compute(lesser[seed])) for seed in seeds}
    difference = interval(list(by_seed.values()))
    return {
        **asdict(claim),
        "difference": asdict(difference),
        "seeds": {str(seed): sum(values.values()) / len(values) for seed, values in by_seed.items()},
        "questions": min(map(len, by_seed.values())),
        "status": claim_status(difference).value,
    }


# -- files ------------------------------------------------------------------------


def write_ablation_files(run_dir: Path, ablation: Json) -> None:
    """Write `ablation.json` and `ablation.csv`, each atomically."""
    write_json(run_dir / ABLATION_JSON, ablation)
    write_csv(run_dir / ABLATION_CSV, list(_rows(ablation)))


def _rows(ablation: Json) -> Iterator[Json]:
    """Yield one row per variant and seed, and one per variant over all seeds (`seed` is `all`)."""
    claims = {(c["metric"], c["lesser"]): c for c in ablation["claims"] if c["greater"] == FULL}
    for name, variant in ablation["variants"].items():
        claim = claims.get((ACCURACY, name))
        for seed, run in [*variant["seeds"].items(), ("all", variant)]:
            pooled = seed == "all"
            accuracy, zooms = variant["accuracy"] if pooled else {}, variant["zooms"] if pooled else {}
            difference = claim["difference"] if claim and pooled else {}
            yield {
                "variant": name,
                "seed": seed,
                "accuracy": accuracy.get("mean") if pooled else run["accuracy"],
                "accuracy_low": accuracy.get("low"),
                "accuracy_high": accuracy.get("high"),
                "zooms_mean": zooms.get("mean") if pooled else run["zooms"],
                **{key: run[key] for key in ("frames_mean", "zoom_call_rate", "valid_zoom_rate")},
                **{key: run[key] for key in ("event_coverage", "questions", "invalid")},
                "full_minus_this": difference.get("mean") if pooled else claim and claim["seeds"].get(seed),
                "difference_low": difference.get("low"),
                "difference_high": difference.get("high"),
                "status": claim["status"] if claim and pooled else None,
                "paper_longvideoreason": variant["paper"]["accuracy"].get("longvideoreason/accuracy"),
                "paper_zooms": variant["paper"]["zooms"],
            }
