"""A fleet's metrics of one step, from what its workers have counted since their starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from vz_ray.monitoring import metric_names
from vz_ray.rollout.engine_stats import EngineStats
from vz_ray.rollout.rollout_worker import WorkerStats

_COUNTS = ("prompt_tokens", "cached_tokens", "sampled_tokens", "frames", "cached_frames", "preempted")


class RolloutMetrics:
    """Remembers the last counts of each worker; those of a new one begin at nothing."""

    def __init__(self) -> None:
        self._last: dict[str, EngineStats] = {}

    def compute(self, workers: Sequence[WorkerStats], seconds: float) -> dict[str, float]:
        """Metrics since the last call, `seconds` ago."""
        grown = dict.fromkeys(_COUNTS, 0)
        for worker in workers:
            before = self._last.get(worker.name, EngineStats())
            for name in _COUNTS:
                grown[name] += getattr(worker.engine, name) - getattr(before, name)
        self._last = {worker.name: worker.engine for worker in workers}
        engines = [worker.engine for worker in workers]
        return {
            metric_names.PREFIX_CACHE_HIT_RATE: grown["cached_tokens"] / max(1, grown["prompt_tokens"]),
            metric_names.FRAME_CACHE_HIT_RATE: grown["cached_frames"] / max(1, grown["frames"]),
            metric_names.TOKENS_PER_SECOND: grown["sampled_tokens"] / max(1e-9, seconds),
            metric_names.PREEMPTED_TURNS: float(grown["preempted"]),
            metric_names.WORKERS: float(len(workers)),
            metric_names.KV_CACHE_USAGE: max(
                (e.kv_cache_used_tokens / e.kv_cache_tokens for e in engines if e.kv_cache_tokens),
                default=0.0,
            ),
            metric_names.WORKER_MEMORY: 1e6 * _largest(map(attrgetter("worker_memory_mb"), workers)),
            metric_names.ENGINE_MEMORY: 1e6 * _largest(map(attrgetter("engine_memory_mb"), workers)),
            metric_names.DRIVER_MEMORY: 1e6 * process_memory_mb(),
        }


def _largest(values: Iterable[float]) -> float:
    return max(values, default=0.0)


def process_memory_mb() -> float:
    """Resident memory of this process, MB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6
