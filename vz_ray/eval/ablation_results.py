"""What an ablation found: figures of every variant, differences to the full loop, and what they show.

Differences are paired: the same questions, and for each seed the training that
shares that seed's cold start. Intervals draw seeds and whole videos
(`interval.crossed_bootstrap`). A difference whose interval holds 0 is *not
shown*, whatever its sign; the paper's order holds if every one of its claims is
shown.
"""

from __future__ import annotations

import csv
import io
import json
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
from vz_ray.config.eval import EvalConfig
from vz_ray.eval.bootstrap import ConfidenceInterval, crossed_bootstrap
from vz_ray.eval.eval_log import EvalResult
from vz_ray.eval.eval_metrics import EvalMetrics, accuracy_by_task, compute_eval_metrics, reward_parts_of
from vz_ray.eval.paper_results import load_paper_results
from vz_ray.utils.atomic_files import write_atomic

Json = dict[str, Any]
ResultsByVariant = Mapping[str, Mapping[int, Sequence[EvalResult]]]
"""By variant and seed."""

ABLATION_JSON, ABLATION_CSV, ABLATION_MARKDOWN = "ablation.json", "ablation.csv", "ablation.md"
ACCURACY, ZOOMS = "accuracy", "zooms"

PAPER_MODEL_NAMES = {
    FULL: "VideoZoomer 7B",
    WITHOUT_RL: "without RL",
    WITHOUT_COLD_START: "without cold start",
    WITHOUT_REFLECTION: "without reflection",
    WITHOUT_TOOL_REWARD: "without tool reward",
}
"""What the paper calls each variant."""


class ClaimStatus(StrEnum):
    SHOWN = "shown"
    NOT_SHOWN = "not shown"
    REVERSED = "reversed"


def claim_status(difference: ConfidenceInterval) -> ClaimStatus:
    """What the interval of (what is claimed to be more) - (what is claimed to be less) says of the claim."""
    if difference.low > 0:
        return ClaimStatus.SHOWN
    return ClaimStatus.REVERSED if difference.high < 0 else ClaimStatus.NOT_SHOWN


@dataclass(frozen=True, slots=True)
class AblationClaim:
    """A line of the paper's order: `greater` has more of `metric` than `lesser`."""

    metric: str
    greater: str
    lesser: str


CLAIMS = (
    *(AblationClaim(ACCURACY, FULL, variant) for variant in reversed(VARIANTS) if variant != FULL),
    AblationClaim(ZOOMS, FULL, WITHOUT_REFLECTION),
    AblationClaim(ZOOMS, WITHOUT_REFLECTION, WITHOUT_TOOL_REWARD),
)


def zooms_by_task(results: Sequence[EvalResult]) -> dict[str, float]:
    """Zooms carried out in each valid episode."""
    return {r.task.task_id: float(len(r.trajectory.zooms)) for r in results if reward_parts_of(r).valid}


_VALUES: Mapping[str, Callable[[Sequence[EvalResult]], dict[str, float]]] = {
    ACCURACY: accuracy_by_task,
    ZOOMS: zooms_by_task,
}


def build_ablation_results(results: ResultsByVariant, config: EvalConfig) -> Json:
    """All figures, as JSON values; variants and seeds that have no results yet are left out."""
    videos = {r.task.task_id: r.task.video for runs in results.values() for run in runs.values() for r in run}
    interval = partial(
        crossed_bootstrap,
        clusters=videos,
        num_resamples=config.bootstrap_resamples,
        confidence_level=config.confidence_level,
        seed=config.seed,
    )
    variants = {name: results[name] for name in VARIANTS if results.get(name)}
    claims = [
        _claim(claim, variants[claim.greater], variants[claim.lesser], interval)
        for claim in CLAIMS
        if variants.get(claim.greater, {}).keys() & variants.get(claim.lesser, {}).keys()
    ]
    asked = {r.task.task_id for run in variants.get(FULL, {}).values() for r in run}
    return {
        "seeds": sorted({seed for runs in variants.values() for seed in runs}),
        "questions": len(asked),
        "videos": len({videos[task] for task in asked}),
        "interval_level": config.confidence_level,
        "paper": load_paper_results().source,
        "variants": {name: _variant(name, runs, config, interval) for name, runs in variants.items()},
        "claims": claims,
        "order_holds": len(claims) == len(CLAIMS) and all(c["verdict"] == ClaimStatus.SHOWN for c in claims),
    }


def _variant(
    name: str,
    runs: Mapping[int, Sequence[EvalResult]],
    config: EvalConfig,
    interval: Callable[..., ConfidenceInterval],
) -> Json:
    pooled = compute_eval_metrics([result for run in runs.values() for result in run], config)
    means = {figure: [of(run) for run in runs.values()] for figure, of in _VALUES.items()}
    return {
        **{figure: asdict(interval(values)) if all(values) else None for figure, values in means.items()},
        **_costs(pooled),
        "seeds": {str(seed): _run(compute_eval_metrics(run, config)) for seed, run in sorted(runs.items())},
        "paper": {
            "zooms": load_paper_results().mean_zooms.get(PAPER_MODEL_NAMES[name]),
            "accuracy": {
                f"{benchmark}/{figure}": models[PAPER_MODEL_NAMES[name]]
                for benchmark, figures in load_paper_results().figures.items()
                for figure, models in figures.items()
                if PAPER_MODEL_NAMES[name] in models and PAPER_MODEL_NAMES[WITHOUT_RL] in models
            },
        },
    }


def _run(metrics: EvalMetrics) -> Json:
    """One seed's figures."""
    accuracy = metrics.accuracy.mean if metrics.accuracy else None
    return {"accuracy": accuracy, "zooms": metrics.zooms_mean, **_costs(metrics)}


def _costs(metrics: EvalMetrics) -> Json:
    names = ("questions", "invalid", "frames_mean", "zoom_call_rate", "valid_zoom_rate", "event_coverage")
    return {name: getattr(metrics, name) for name in names}


def _claim(
    claim: AblationClaim,
    more: Mapping[int, Sequence[EvalResult]],
    less: Mapping[int, Sequence[EvalResult]],
    interval: Callable[..., ConfidenceInterval],
) -> Json:
    """A claim, the paired difference that speaks of it, by seed too, and the verdict."""
    of = _VALUES[claim.metric]
    by_seed = {
        seed: _difference(of(more[seed]), of(less[seed])) for seed in sorted(more.keys() & less.keys())
    }
    difference = interval(list(by_seed.values()))
    return {
        **asdict(claim),
        "difference": asdict(difference),
        "seeds": {str(seed): sum(values.values()) / len(values) for seed, values in by_seed.items()},
        "questions": min(map(len, by_seed.values())),
        "verdict": claim_status(difference).value,
    }


def _difference(more: Mapping[str, float], less: Mapping[str, float]) -> dict[str, float]:
    """By task, over those that both have."""
    return {task: value - less[task] for task, value in more.items() if task in less}


# -- files ------------------------------------------------------------------------


def write_ablation_files(run: Path, found: Json) -> None:
    """Writes `ablation.json` and `ablation.csv`, each whole or not at all."""
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(run / ABLATION_JSON, text.encode())
    file = io.StringIO(newline="")
    rows = list(_rows(found))
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(run / ABLATION_CSV, file.getvalue().encode())


def _rows(found: Json) -> Iterator[Json]:
    """A row per variant and seed, and one for each variant's mean, whose seed is `all`."""
    against = {(c["metric"], c["lesser"]): c for c in found["claims"] if c["greater"] == FULL}
    for name, variant in found["variants"].items():
        claim = against.get((ACCURACY, name))
        for seed, run in [*variant["seeds"].items(), ("all", variant)]:
            whole = seed == "all"
            accuracy, zooms = variant["accuracy"] if whole else {}, variant["zooms"] if whole else {}
            difference = claim["difference"] if claim and whole else {}
            yield {
                "variant": name,
                "seed": seed,
                "accuracy": accuracy.get("mean") if whole else run["accuracy"],
                "accuracy_low": accuracy.get("low"),
                "accuracy_high": accuracy.get("high"),
                "zooms_mean": zooms.get("mean") if whole else run["zooms"],
                **{key: run[key] for key in ("frames_mean", "zoom_call_rate", "valid_zoom_rate")},
                **{key: run[key] for key in ("event_coverage", "questions", "invalid")},
                "full_minus_this": difference.get("mean") if whole else claim and claim["seeds"].get(seed),
                "difference_low": difference.get("low"),
                "difference_high": difference.get("high"),
                "verdict": claim["verdict"] if claim and whole else None,
                "paper_longvideoreason": variant["paper"]["accuracy"].get("longvideoreason/accuracy"),
                "paper_zooms": variant["paper"]["zooms"],
            }
