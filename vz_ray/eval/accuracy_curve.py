"""Accuracy against frames, zooms and the zooms' frame rate: `curve.json`, from several modes and models.

Accuracy is the mean over questions, strictly read, with its interval over
videos; where a benchmark's headline is another average, it is not this one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vz_ray.eval.eval_mode import AGENT, UNIFORM, EvalMode
from vz_ray.eval.paper_results import load_paper_results
from vz_ray.utils.atomic_files import write_atomic

Json = dict[str, Any]

CURVE_JSON = "curve.json"
FIXED_FPS = "fixed_fps"
_COST = ("frames_mean", "frames_p95", "zooms_mean", "valid_zoom_rate", "seconds_mean")


def build_curve(found: Mapping[str, Any]) -> Json:
    """Points of each benchmark and model, from the JSON values of its outcome.

    `uniform` goes by frames (`limit`), `agent` by the most zooms (`limit`), `fixed_fps` by the rate that
    the agent's zooms were shown at (`fps`).
    """
    return {
        "models": found["models"],
        "paper": found["paper"]["source"],
        "interval_level": found["interval_level"],
        "benchmarks": {
            key: {
                "title": benchmark["title"],
                "models": {label: _series(benchmark["modes"], label) for label in found["models"]},
                "paper_zooms": [
                    round(value / 100, 4)
                    for value in load_paper_results().zooms.get(benchmark["adapter"], ())
                ],
            }
            for key, benchmark in found["benchmarks"].items()
        },
    }


def _series(modes: Mapping[str, Any], label: str) -> dict[str, list[Json]]:
    """A model's points; ascending, and an agent without a limit comes last, its `limit` being null."""
    found: dict[str, list[Json]] = {UNIFORM: [], AGENT: [], FIXED_FPS: []}
    for name, played in modes.items():
        mode, metrics = EvalMode.parse(name), played["metrics"]
        if mode.model != label or metrics["accuracy"] is None:
            continue
        cost = {key: metrics[key] for key in _COST}
        point = {"limit": mode.limit, "accuracy": metrics["accuracy"], **cost}
        if mode.fps is None:
            found[mode.kind].append(point)
        else:
            found[FIXED_FPS].append({"fps": mode.fps, **point})
    for points in found.values():
        points.sort(key=lambda at: (at.get("fps", 0), at["limit"] is None, at["limit"] or 0))
    return found


def write_curve(run: Path, found: Mapping[str, Any]) -> None:
    """Writes `curve.json`, whole or not at all."""
    text = json.dumps(build_curve(found), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(run / CURVE_JSON, text.encode())
