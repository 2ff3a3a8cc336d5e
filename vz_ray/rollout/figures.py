"""A fleet's metrics of one step, from what its workers have counted since their starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from vz_ray.observe import names
from vz_ray.rollout.engine_stats import EngineStats
from vz_ray.rollout.worker import WorkerStats

_COUNTS = ("prompt_tokens", "cached_tokens", "sampled_tokens", "frames", "cached_frames", "preempted")


class FleetFigures:
    """Remembers the last counts of each worker; those of a new one begin at nothing."""

    def __init__(self) -> None:
        self._last: dict[str, EngineStats] = {}

    def step(self, workers: Sequence[WorkerStats], seconds: float) -> dict[str, float]:
        """Metrics since the last call, `seconds` ago."""
        grown = dict.fromkeys(_COUNTS, 0)
        for worker in workers:
            before = self._last.get(worker.name, EngineStats())
            for name in _COUNTS:
                grown[name] += getattr(worker.engine, name) - getattr(before, name)
        self._last = {worker.name: worker.engine for worker in workers}
        engines = [worker.engine for worker in workers]
        return {
            names.PREFIX_CACHE_HIT: grown["cached_tokens"] / max(1, grown["prompt_tokens"]),
            names.FRAME_CACHE_HIT: grown["cached_frames"] / max(1, grown["frames"]),
            names.TOKENS_PER_S: grown["sampled_tokens"] / max(1e-9, seconds),
            names.PREEMPTED: float(grown["preempted"]),
            names.WORKERS: float(len(workers)),
            names.KV_USED: max((e.kv_used / e.kv_tokens for e in engines if e.kv_tokens), default=0.0),
            names.WORKER_MB: _largest(map(attrgetter("rss_mb"), workers)),
            names.ENGINE_MB: _largest(map(attrgetter("engine_mb"), workers)),
            names.DRIVER_MB: own_mb(),
        }


def _largest(values: Iterable[float]) -> float:
    return max(values, default=0.0)


def own_mb() -> float:
    """Resident memory of this process, MB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6
