"""Accuracy against frames and against zooms: `curve.json`, from what was played in several modes.

Accuracy is the mean over questions, strictly read, with its interval over
videos; where a benchmark's headline is another average, it is not this one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vz_ray.evaluate.modes import AGENT, UNIFORM, Mode
from vz_ray.evaluate.paper import paper
from vz_ray.observe.run_dir import write_atomic

Json = dict[str, Any]

CURVE = "curve.json"
_COST = ("frames_mean", "frames_p95", "zooms_mean", "valid_zoom_rate", "seconds_mean")


def curve_of(found: Mapping[str, Any]) -> Json:
    """Points of each benchmark, from the JSON values of its outcome; uniform by frames, agents by zooms."""
    return {
        "model": found["model"],
        "paper": found["paper"]["source"],
        "interval_level": found["interval_level"],
        "benchmarks": {
            key: {
                "title": benchmark["title"],
                UNIFORM: _points(benchmark["modes"], UNIFORM),
                AGENT: _points(benchmark["modes"], AGENT),
                "paper_zooms": [
                    round(value / 100, 4) for value in paper().zooms.get(benchmark["adapter"], ())
                ],
            }
            for key, benchmark in found["benchmarks"].items()
        },
    }


def _points(modes: Mapping[str, Any], kind: str) -> list[Json]:
    """Ascending; an agent without a limit comes last, its `limit` being null."""
    points = []
    for name, played in modes.items():
        mode, metrics = Mode.of(name), played["metrics"]
        if mode.kind == kind and metrics["accuracy"] is not None:
            cost = {key: metrics[key] for key in _COST}
            points.append({"limit": mode.limit, "accuracy": metrics["accuracy"], **cost})
    return sorted(points, key=lambda point: (point["limit"] is None, point["limit"] or 0))


def write_curve(run: Path, found: Mapping[str, Any]) -> None:
    """Writes `curve.json`, whole or not at all."""
    text = json.dumps(curve_of(found), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(run / CURVE, text.encode())
