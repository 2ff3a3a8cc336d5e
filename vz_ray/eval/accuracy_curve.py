"""Accuracy against frames, zooms and zoom frame rate over several modes and models: `curve.json`.

Accuracy is the mean over questions under strict scoring, with an interval over videos.
It differs from a benchmark's headline metric if that is another average.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vz_ray.eval.eval_mode import AGENT, UNIFORM, EvalMode
from vz_ray.eval.paper_results import load_paper_results
from vz_ray.utils.atomic_files import write_json

Json = dict[str, Any]

CURVE_JSON = "curve.json"
FIXED_FPS = "fixed_fps"
_COST_METRICS = ("frames_mean", "frames_p95", "zooms_mean", "valid_zoom_rate", "seconds_mean")


def build_curve(results: Mapping[str, Any]) -> Json:
    """Build the curve points of each benchmark and model from the JSON values of `benchmarks.json`.

    The x axis of `uniform` is the number of frames (`limit`), of `agent` the maximum number of zooms
    (`limit`), of `fixed_fps` the frame rate of the zooms (`fps`).
    """
    paper = load_paper_results()
    return {
        "models": results["models"],
        "paper": results["paper"]["source"],
        "interval_level": results["interval_level"],
        "benchmarks": {
            key: {
                "title": benchmark["title"],
                "models": {label: _series(benchmark["modes"], label) for label in results["models"]},
                "paper_zooms": [
                    round(value / 100, 4) for value in paper.accuracy_by_max_zooms.get(benchmark["adapter"], ())
                ],
            }
            for key, benchmark in results["benchmarks"].items()
        },
    }


def _series(modes: Mapping[str, Any], label: str) -> dict[str, list[Json]]:
    """Return a model's points in ascending order; an agent without a limit (`limit: null`) comes last."""
    series: dict[str, list[Json]] = {UNIFORM: [], AGENT: [], FIXED_FPS: []}
    for name, mode_results in modes.items():
        mode, metrics = EvalMode.parse(name), mode_results["metrics"]
        if mode.model != label or metrics["accuracy"] is None:
            continue
        costs = {key: metrics[key] for key in _COST_METRICS}
        point = {"limit": mode.limit, "accuracy": metrics["accuracy"], **costs}
        if mode.fps is None:
            series[mode.kind].append(point)
        else:
            series[FIXED_FPS].append({"fps": mode.fps, **point})
    for points in series.values():
        points.sort(key=lambda point: (point.get("fps", 0), point["limit"] is None, point["limit"] or 0))
    return series


def write_curve(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Write `curve.json` atomically."""
    write_json(run_dir / CURVE_JSON, build_curve(results))
