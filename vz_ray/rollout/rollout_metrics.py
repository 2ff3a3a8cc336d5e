"""Rollout metrics of one step, from the cumulative counters of the workers."""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.monitoring import metric_names
from vz_ray.rollout.engine_stats import EngineStats
from vz_ray.rollout.rollout_worker import WorkerStats

_COUNTERS = ("prompt_tokens", "cached_tokens", "sampled_tokens", "frames", "cached_frames", "preempted_turns")


class RolloutMetrics:
    """Compute increments between steps. The counters of a new worker start at 0."""

    def __init__(self) -> None:
        self._previous: dict[str, EngineStats] = {}

    def compute(self, workers: Sequence[WorkerStats], seconds: float) -> dict[str, float]:
        """Return the metrics since the last call, `seconds` ago."""
        increments = dict.fromkeys(_COUNTERS, 0)
        for worker in workers:
            previous = self._previous.get(worker.name, EngineStats())
            for name in _COUNTERS:
                increments[name] += getattr(worker.engine, name) - getattr(previous, name)
        self._previous = {worker.name: worker.engine for worker in workers}
        kv_cache_usage = [
            worker.engine.kv_cache_used_tokens / worker.engine.kv_cache_tokens
            for worker in workers
            if worker.engine.kv_cache_tokens
        ]
        return {
            metric_names.PREFIX_CACHE_HIT_RATE: (increments["cached_tokens"] / max(1, increments["prompt_tokens"])),
            metric_names.FRAME_CACHE_HIT_RATE: increments["cached_frames"] / max(1, increments["frames"]),
            metric_names.TOKENS_PER_SECOND: increments["sampled_tokens"] / max(1e-9, seconds),
            metric_names.PREEMPTED_TURNS: float(increments["preempted_turns"]),
            metric_names.WORKERS: float(len(workers)),
            metric_names.KV_CACHE_USAGE: max(kv_cache_usage, default=0.0),
            metric_names.WORKER_MEMORY: float(max((worker.worker_memory_bytes for worker in workers), default=0)),
            metric_names.ENGINE_MEMORY: float(max((worker.engine_memory_bytes for worker in workers), default=0)),
            metric_names.DRIVER_MEMORY: float(process_memory_bytes()),
        }


def process_memory_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)
