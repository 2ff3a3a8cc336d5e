"""Periodic status of a run: polls rollout workers and decoders, updates Prometheus gauges and `live.json`.

every interval_s --> worker statuses and stats, decode pool stats    a missing answer is skipped;
                                                                     SFT and distillation have no workers
                 --> all gauges of the metric catalog                Ray drops gauges that are not set again
                 --> live.json, prometheus_targets.json
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, Protocol, TypeVar

from vz_ray.decode import DecodeClientStats, DecodePoolStats
from vz_ray.monitoring.live_status import RunKind, RunState
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rollout.rollout_metrics import process_memory_bytes
from vz_ray.rollout.rollout_worker import WorkerStats
from vz_ray.rollout.worker_handle import WorkerState, WorkerStatus
from vz_ray.runtime.run_monitor import PHASES, RunMonitor
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.timeouts import with_timeout

T = TypeVar("T")

log = logging.getLogger(__name__)

STATS_TIMEOUT_S = 4.0
"""Timeout for the statistics of workers and decoders."""
_FRAME_SOURCES = {"memory": "hits", "disk": "disk_hits", "decoded": "misses"}
_FAILURE_KINDS = ("retried", "timed_out", "lost", "killed")


class RolloutStatsSource(Protocol):
    """Part of `WorkerPool` that the heartbeat reads."""

    @property
    def queued_episodes(self) -> int: ...

    @property
    def lost_workers(self) -> int: ...

    def worker_statuses(self) -> list[WorkerStatus]: ...

    async def worker_stats(self) -> list[WorkerStats]: ...


class DecodeStatsSource(Protocol):
    """Part of `DecodePool` that the heartbeat reads."""

    def client_stats(self) -> DecodeClientStats: ...

    async def stats(self) -> DecodePoolStats: ...


class CounterDeltas:
    """Increases of counters between heartbeats. A counter that decreased has been reset and counts from 0.

    Attributes:
        started: If False, `increase` returns 0: earlier counts precede this monitor.
    """

    def __init__(self) -> None:
        self._last: defaultdict[str, float] = defaultdict(float)
        self.started = False

    def increase(self, key: str, count: float) -> float:
        """Return the increase of a counter since the previous call with this key."""
        previous, self._last[key] = self._last[key], count
        if not self.started:
            return 0.0
        return count - previous if count >= previous else count


class Heartbeat:
    """Updates the status of a run every `interval_s` seconds while `run` is awaited.

    Args:
        monitor: State reported by the training loop.
        run_dir: Receives `live.json` and `prometheus_targets.json`.
        rollout: Worker pool; None for runs without workers.
        pool: Decode pool.
        targets: Returns `host:port` of the metrics agent of each node.
    """

    def __init__(
        self,
        monitor: RunMonitor,
        run_dir: RunDir,
        rollout: RolloutStatsSource | None,
        pool: DecodeStatsSource,
        interval_s: float,
        targets: Callable[[], list[str]],
    ) -> None:
        self._monitor, self._run_dir, self._rollout, self._pool = monitor, run_dir, rollout, pool
        self._interval_s, self._targets = interval_s, targets
        self._deltas = CounterDeltas()
        self._last_beat = time.monotonic()
        self._warned = False
        status = monitor.status
        status.host, status.pid, status.heartbeat_interval_s = socket.gethostname(), os.getpid(), interval_s

    async def run(self) -> None:
        """Beat until cancelled. The first failed heartbeat is logged; failures do not stop the run."""
        while True:
            try:
                await self.beat()
            except Exception:
                if not self._warned:
                    log.warning("Heartbeat failed; the run continues", exc_info=True)
                self._warned = True
            await asyncio.sleep(self._interval_s)

    async def beat(self) -> None:
        """Poll workers and decoders once and publish the result."""
        workers, pool = await asyncio.gather(self._poll_workers(), self._poll(self._pool.stats()))
        now = time.monotonic()
        elapsed_s = max(1e-6, now - self._last_beat)
        self._last_beat = now
        if self._rollout is not None:
            self._update_rollout(self._rollout, workers, elapsed_s)
        self._update_decode([worker.decode_stats for worker in workers or ()], pool)
        self._set_run_gauges()
        self._deltas.started = True
        await asyncio.to_thread(self._write)

    async def finish(self, state: RunState, error: str) -> None:
        """Publish the final state; `error` is the error of a failed run."""
        status = self._monitor.status
        status.state, status.error, status.eta_s = state.value, error, None
        try:
            if self._rollout is not None and status.rollout:
                # The last heartbeat may have run during a publish.
                status.rollout |= _worker_summary(self._rollout)
            self._set_run_gauges()
            await asyncio.to_thread(self._write)
        except Exception:
            log.warning("Writing the final status to %s failed", self._run_dir.live_status, exc_info=True)

    async def _poll_workers(self) -> list[WorkerStats] | None:
        return None if self._rollout is None else await self._poll(self._rollout.worker_stats())

    async def _poll(self, stats: Awaitable[T]) -> T | None:
        try:
            return await with_timeout(
                stats, STATS_TIMEOUT_S, target="workers or decoders", operation="their statistics"
            )
        except Exception as error:
            log.debug("No statistics from workers or decoders: %s", error)
            return None

    def _update_rollout(
        self, rollout: RolloutStatsSource, workers: Sequence[WorkerStats] | None, elapsed_s: float
    ) -> None:
        monitor, metrics = self._monitor, self._monitor.metrics
        summary = _worker_summary(rollout)
        for state in WorkerState:
            metrics.set("vz_workers", summary["workers"].get(state.value, 0), state=state.value)
        metrics.set("vz_episodes_running", summary["running"])
        metrics.set("vz_episodes_waiting", rollout.queued_episodes)
        metrics.add("vz_lost_workers", self._deltas.increase("lost workers", rollout.lost_workers))
        episodes_per_second = self._deltas.increase("episodes", monitor.accepted_episodes) / elapsed_s
        metrics.set("vz_episodes_per_second", episodes_per_second)
        tokens_per_second = monitor.status.rollout.get("tokens_per_second", 0.0)
        if workers is not None:
            sampled = (self._deltas.increase(f"tokens {w.name}", w.engine.sampled_tokens) for w in workers)
            tokens_per_second = sum(sampled) / elapsed_s
        metrics.set("vz_tokens_per_second", tokens_per_second)
        monitor.status.rollout = {
            **summary,
            "tokens_per_second": round(tokens_per_second, 2),
            "episodes_per_second": round(episodes_per_second, 4),
        }

    def _update_decode(self, clients: Sequence[DecodeClientStats], pool: DecodePoolStats | None) -> None:
        monitor, metrics = self._monitor, self._monitor.metrics
        requests = reduce(add, clients, self._pool.client_stats())
        metrics.set("vz_decode_requests", requests.in_flight, state="in_flight")
        metrics.set("vz_decode_requests", requests.waiting, state="waiting")
        for kind in _FAILURE_KINDS:
            increase = self._deltas.increase(f"decode {kind}", getattr(requests, kind))
            metrics.add("vz_decode_failures", increase, kind=kind)
        waits = sorted(monitor.clip_waits_s)
        status = monitor.status.decode | {
            "in_flight": requests.in_flight,
            "waiting": requests.waiting,
            "failures": requests.timed_out + requests.lost + requests.killed,
            "quarantined": requests.quarantined,
            "wait_p50_s": waits[len(waits) // 2] if waits else None,
            "wait_p95_s": waits[int(0.95 * (len(waits) - 1))] if waits else None,
        }
        if pool is not None:
            status |= {"decoders": pool.num_decoders, "unresponsive": len(pool.unresponsive)}
            frames = {source: getattr(pool.reader, name) for source, name in _FRAME_SOURCES.items()}
            status["hit_ratio"] = 1 - frames["decoded"] / max(1, sum(frames.values()))
            for source, count in frames.items():
                increase = self._deltas.increase(f"frames {source}", count)
                metrics.add("vz_decode_frames", increase, source=source)
        unresponsive = status.get("unresponsive", 0)
        metrics.set("vz_decoders", status.get("decoders", 0) - unresponsive, state="responsive")
        metrics.set("vz_decoders", unresponsive, state="unresponsive")
        monitor.status.decode = status

    def _set_run_gauges(self) -> None:
        """Set every gauge that needs no polling."""
        monitor, metrics, status = self._monitor, self._monitor.metrics, self._monitor.status
        running = status.state == RunState.RUNNING
        metrics.set("vz_step", status.step)
        metrics.set("vz_max_steps", status.max_steps)
        for phase in PHASES:
            metrics.set("vz_phase", float(running and phase == status.phase), phase=phase)
        metrics.set("vz_heartbeat_timestamp_seconds", time.time())
        metrics.set("vz_last_step_timestamp_seconds", status.last_step_s)
        if status.run_kind != RunKind.DISTILL:  # distillation writes each episode to disk
            last_checkpoint_s = status.checkpoint.get("at_s", monitor.started_s)
            metrics.set("vz_last_checkpoint_timestamp_seconds", last_checkpoint_s)
            metrics.set("vz_checkpoint_seconds", status.checkpoint.get("seconds", 0.0))
        if math.isfinite(monitor.max_mismatch_kl):
            metrics.set("vz_mismatch_kl_limit_nats", monitor.max_mismatch_kl)
        for (name, _), (labels, value) in monitor.step_gauges.items():
            metrics.set(name, value, **labels)
        status.driver_memory_bytes = process_memory_bytes()
        metrics.set("vz_driver_memory_bytes", status.driver_memory_bytes)
        for sink, count in monitor.dropped_records().items():
            metrics.add("vz_dropped_records", self._deltas.increase(f"dropped {sink}", count), sink=sink)

    def _write(self) -> None:
        status = self._monitor.status
        targets = self._targets()
        if targets != status.prometheus_targets or not self._run_dir.prometheus_targets.exists():
            target_groups = [{"targets": targets, "labels": {"job": "vz_ray"}}]
            write_atomic(self._run_dir.prometheus_targets, json.dumps(target_groups).encode())
        status.prometheus_targets = targets
        status.write(self._run_dir.live_status)


def _worker_summary(rollout: RolloutStatsSource) -> dict[str, Any]:
    """Summarize the scheduler's view of its workers; sends no request."""
    statuses = rollout.worker_statuses()
    alive = [status for status in statuses if status.state is not WorkerState.DEAD]
    return {
        "workers": dict(Counter(status.state.value for status in statuses)),
        "worker_statuses": [
            {"name": s.name, "state": s.state.value, "load": s.load, "reason": s.reason} for s in alive
        ],
        "running": sum(status.load for status in alive),
        "queued": rollout.queued_episodes,
        "lost": rollout.lost_workers,
    }
