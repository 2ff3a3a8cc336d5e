"""A fleet's metrics of one step."""

from __future__ import annotations

import pytest

from vz_ray.rollout.engine_stats import EngineStats
from vz_ray.rollout.figures import FleetFigures
from vz_ray.rollout.worker import WorkerStats


def worker(name: str, **counts: int) -> WorkerStats:
    return WorkerStats(name, 1, 0, 0, 0, 100.0, 900.0, EngineStats(**counts))


def test_counts_are_of_the_step_and_begin_at_nothing_for_a_new_worker() -> None:
    figures = FleetFigures()
    old = worker("a", prompt_tokens=1000, cached_tokens=500, sampled_tokens=80, frames=10, cached_frames=5)
    first = figures.step([old], 4.0)
    assert first["fleet/prefix_cache_hit"] == pytest.approx(0.5)
    assert first["fleet/tokens_per_s"] == pytest.approx(20.0)
    grown = worker("a", prompt_tokens=1100, cached_tokens=590, sampled_tokens=90, frames=20, cached_frames=15)
    new = worker("b", prompt_tokens=100, sampled_tokens=10, preempted=2, kv_tokens=64, kv_used=16)
    second = figures.step([grown, new], 2.0)
    assert second["fleet/prefix_cache_hit"] == pytest.approx(90 / 200)
    assert second["fleet/frame_cache_hit"] == pytest.approx(1.0)
    assert second["fleet/tokens_per_s"] == pytest.approx(10.0)
    assert (second["fleet/preempted"], second["fleet/workers"], second["fleet/kv_used"]) == (2, 2, 0.25)
    assert (second["memory/worker_mb"], second["memory/engine_mb"]) == (100, 900)
    assert second["memory/driver_mb"] > 10


def test_a_fleet_of_none_has_figures_too() -> None:
    found = FleetFigures().step([], 1.0)
    assert found["fleet/workers"] == found["fleet/tokens_per_s"] == found["fleet/prefix_cache_hit"] == 0
