"""Rollout metrics of one step."""

from __future__ import annotations

import pytest

from vz_ray.rollout.engine_stats import EngineStats
from vz_ray.rollout.rollout_metrics import RolloutMetrics
from vz_ray.rollout.rollout_worker import WorkerStats


def worker(name: str, **counts: int) -> WorkerStats:
    return WorkerStats(name, 1, 0, 0, 0, 100_000_000, 900_000_000, EngineStats(**counts))


def test_metrics_are_increments_per_worker() -> None:
    metrics = RolloutMetrics()
    old = worker("a", prompt_tokens=1000, cached_tokens=500, sampled_tokens=80, frames=10, cached_frames=5)
    first = metrics.compute([old], 4.0)
    assert first["rollout/prefix_cache_hit_rate"] == pytest.approx(0.5)
    assert first["rollout/tokens_per_second"] == pytest.approx(20.0)
    grown = worker("a", prompt_tokens=1100, cached_tokens=590, sampled_tokens=90, frames=20, cached_frames=15)
    new = worker(
        "b",
        prompt_tokens=100,
        sampled_tokens=10,
        preempted_turns=2,
        kv_cache_tokens=64,
        kv_cache_used_tokens=16,
    )
    second = metrics.compute([grown, new], 2.0)
    assert second["rollout/prefix_cache_hit_rate"] == pytest.approx(90 / 200)
    assert second["rollout/frame_cache_hit_rate"] == pytest.approx(1.0)
    assert second["rollout/tokens_per_second"] == pytest.approx(10.0)
    assert (
        second["rollout/preempted_turns"],
        second["rollout/workers"],
        second["rollout/kv_cache_usage"],
    ) == (2, 2, 0.25)
    assert (second["memory/worker_bytes"], second["memory/engine_bytes"]) == (100e6, 900e6)
    assert second["memory/driver_bytes"] > 10e6


def test_metrics_are_zero_without_workers() -> None:
    metrics = RolloutMetrics().compute([], 1.0)
    assert (
        metrics["rollout/workers"]
        == metrics["rollout/tokens_per_second"]
        == metrics["rollout/prefix_cache_hit_rate"]
        == 0
    )
