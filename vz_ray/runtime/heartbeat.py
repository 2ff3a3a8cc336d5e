"""The driver's heartbeat: asks fleet and decoders how they are, and tells Prometheus and `live.json`.

every few seconds --> fleet.seats, fleet.stats, pool.stats   whoever does not answer in time is left out;
                                                             supervised runs and distillation have no fleet
                  --> gauges of the catalogue, all of them   Ray forgets what is not set again
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
from collections.abc import Awaitable, Sequence
from functools import reduce
from operator import add
from typing import Any, Protocol, TypeVar

from vz_ray.decode import DecodeClientStats, DecodePoolStats
from vz_ray.monitoring.live_status import DISTILL_RUN, RunState
from vz_ray.monitoring.run_dir import RunDir, write_atomic
from vz_ray.rollout.rollout_metrics import process_memory_mb
from vz_ray.rollout.rollout_worker import WorkerStats
from vz_ray.rollout.worker_handle import WorkerState, WorkerStatus
from vz_ray.runtime.run_monitor import PHASES, RunMonitor
from vz_ray.utils.timeouts import with_timeout

T = TypeVar("T")

log = logging.getLogger(__name__)

STATS_TIMEOUT_S = 4.0
"""How long fleet and decoders may take to say how they are."""
_SOURCES = {"memory": "hits", "disk": "disk_hits", "decoded": "misses"}
_FAILURES = ("retried", "timed_out", "lost", "killed")


class RolloutStatsSource(Protocol):
    """What is asked of a fleet."""

    @property
    def queued_episodes(self) -> int: ...

    @property
    def lost_workers(self) -> int: ...

    def worker_statuses(self) -> list[WorkerStatus]: ...

    async def worker_stats(self) -> list[WorkerStats]: ...


class DecodeStatsSource(Protocol):
    """What is asked of a clip pool."""

    def client_stats(self) -> DecodeClientStats: ...

    async def stats(self) -> DecodePoolStats: ...


class CounterDeltas:
    """What counts have grown by since the last look; those of someone who began anew start at 0 again.

    Attributes:
        started: What was counted before this is set does not count: it was there before the watch.
    """

    def __init__(self) -> None:
        self._last: defaultdict[str, float] = defaultdict(float)
        self.started = False

    def increase(self, key: str, count: float) -> float:
        """Since the last call with this key."""
        before, self._last[key] = self._last[key], count
        if not self.started:
            return 0.0
        return count - before if count >= before else count


class Heartbeat:
    """Looks at a run every `every_s` seconds, as long as `run` is awaited.

    Args:
        watch: What the run has told.
        run: Where `live.json` and `prometheus_targets.json` are written.
        fleet: The rollout workers; None where a run has none.
        pool: The decoders.
        targets: Asked at each beat where the nodes' metrics are: `host:port` of each.
    """

    def __init__(
        self,
        monitor: RunMonitor,
        run: RunDir,
        rollout: RolloutStatsSource | None,
        pool: DecodeStatsSource,
        interval_s: float,
        targets: PrometheusTargets,
    ) -> None:
        self._watch, self._run, self._fleet, self._pool = monitor, run, rollout, pool
        self._every_s, self._targets = interval_s, targets
        self._grown = CounterDeltas()
        self._at = time.monotonic()
        self._told = False
        live = monitor.status
        live.host, live.pid, live.heartbeat_interval_s = socket.gethostname(), os.getpid(), interval_s

    async def run(self) -> None:
        """Beats until it is cancelled; one that goes wrong is logged once, and forgotten."""
        while True:
            try:
                await self.beat()
            except Exception:
                if not self._told:
                    log.warning("a heartbeat failed; the run goes on", exc_info=True)
                self._told = True
            await asyncio.sleep(self._every_s)

    async def beat(self) -> None:
        """One look."""
        workers, pool = await asyncio.gather(self._ask_fleet(), self._ask(self._pool.stats()))
        now, elapsed = time.monotonic(), max(1e-6, time.monotonic() - self._at)
        self._at = now
        if self._fleet is not None:
            self._look_at_fleet(self._fleet, workers, elapsed)
        self._look_at_clips([worker.decode_stats for worker in workers or ()], pool)
        self._tell()
        self._grown.started = True
        await asyncio.to_thread(self._write)

    async def finish(self, state: RunState, error: str) -> None:
        """The last word; `error` says what ended it, where it failed."""
        live = self._watch.status
        live.state, live.error, live.eta_s = state.value, error, None
        try:
            if self._fleet is not None and live.rollout:
                # The last beat may have been while weights were exchanged.
                live.rollout |= _standing(self._fleet)
            self._tell()
            await asyncio.to_thread(self._write)
        except Exception:
            log.warning("the end of the run could not be noted in %s", self._run.live_status, exc_info=True)

    async def _ask_fleet(self) -> list[WorkerStats] | None:
        return None if self._fleet is None else await self._ask(self._fleet.worker_stats())

    async def _ask(self, answer: Awaitable[T]) -> T | None:
        try:
            return await with_timeout(
                answer, STATS_TIMEOUT_S, target="fleet or decoders", operation="how they are"
            )
        except Exception as error:
            log.debug("no word from fleet or decoders: %s", error)
            return None

    def _look_at_fleet(
        self, fleet: RolloutStatsSource, workers: Sequence[WorkerStats] | None, elapsed: float
    ) -> None:
        watch, meters = self._watch, self._watch.metrics
        standing = _standing(fleet)
        for state in WorkerState:
            meters.set("vz_workers", standing["workers"].get(state.value, 0), state=state.value)
        meters.set("vz_episodes_running", standing["playing"])
        meters.set("vz_episodes_waiting", fleet.queued_episodes)
        meters.add("vz_lost_workers", self._grown.increase("lost workers", fleet.lost_workers))
        episodes = self._grown.increase("episodes", watch.accepted_episodes) / elapsed
        meters.set("vz_episodes_per_second", episodes)
        known = watch.status.rollout.get("tokens_per_s", 0.0)
        if workers is not None:
            sampled = (self._grown.increase(f"tokens {w.name}", w.engine.sampled_tokens) for w in workers)
            known = sum(sampled) / elapsed
        meters.set("vz_tokens_per_second", known)
        watch.status.rollout = {
            **standing,
            "tokens_per_s": round(known, 2),
            "episodes_per_s": round(episodes, 4),
        }

    def _look_at_clips(self, handles: Sequence[DecodeClientStats], pool: DecodePoolStats | None) -> None:
        watch, meters = self._watch, self._watch.metrics
        asked = reduce(add, handles, self._pool.client_stats())
        meters.set("vz_decode_requests", asked.in_flight, state="in_flight")
        meters.set("vz_decode_requests", asked.waiting, state="waiting")
        for kind in _FAILURES:
            meters.add(
                "vz_decode_failures", self._grown.increase(f"clips {kind}", getattr(asked, kind)), kind=kind
            )
        waits = sorted(watch.clip_waits_s)
        shown = watch.status.decode | {
            "in_flight": asked.in_flight,
            "waiting": asked.waiting,
            "failures": asked.timed_out + asked.lost + asked.killed,
            "quarantined": asked.quarantined,
            "wait_p50_s": waits[len(waits) // 2] if waits else None,
            "wait_p95_s": waits[int(0.95 * (len(waits) - 1))] if waits else None,
        }
        if pool is not None:
            silent = len(pool.unresponsive)
            shown |= {"decoders": pool.num_decoders, "silent": silent}
            found = {source: getattr(pool.reader, name) for source, name in _SOURCES.items()}
            shown["hit_ratio"] = 1 - found["decoded"] / max(1, sum(found.values()))
            for source, count in found.items():
                meters.add("vz_decode_frames", self._grown.increase(f"frames {source}", count), source=source)
        meters.set("vz_decoders", shown.get("decoders", 0) - shown.get("silent", 0), state="answering")
        meters.set("vz_decoders", shown.get("silent", 0), state="silent")
        watch.status.decode = shown

    def _tell(self) -> None:
        """Every gauge that does not come from a look at others."""
        watch, meters, live = self._watch, self._watch.metrics, self._watch.status
        running = live.state == RunState.RUNNING
        meters.set("vz_step", live.step)
        meters.set("vz_max_steps", live.max_steps)
        for phase in PHASES:
            meters.set("vz_phase", float(running and phase == live.phase), phase=phase)
        meters.set("vz_heartbeat_timestamp_seconds", time.time())
        meters.set("vz_last_step_timestamp_seconds", live.last_step_s)
        if live.run_kind != DISTILL_RUN:  # those are on disk one by one
            meters.set("vz_last_checkpoint_timestamp_seconds", live.checkpoint.get("at_s", watch.started_s))
            meters.set("vz_checkpoint_seconds", live.checkpoint.get("seconds", 0.0))
        if math.isfinite(watch.max_mismatch_kl):
            meters.set("vz_mismatch_kl_limit_nats", watch.max_mismatch_kl)
        for (name, _), (labels, value) in watch.step_gauges.items():
            meters.set(name, value, **labels)
        live.driver_memory_bytes = round(process_memory_mb(), 1)
        meters.set("vz_driver_memory_bytes", live.driver_memory_bytes * 1e6)
        for sink, count in watch.dropped_records().items():
            meters.add("vz_dropped_records", self._grown.increase(f"dropped {sink}", count), sink=sink)

    def _write(self) -> None:
        live = self._watch.status
        targets = self._targets()
        if targets != live.prometheus_targets or not self._run.prometheus_targets.exists():
            group = [{"targets": targets, "labels": {"job": "vz_ray"}}]
            write_atomic(self._run.prometheus_targets, json.dumps(group).encode())
        live.prometheus_targets = targets
        live.write(self._run.live_status)


def _standing(fleet: RolloutStatsSource) -> dict[str, Any]:
    """How it stands with the workers at this moment, without asking them."""
    seats = fleet.worker_statuses()
    alive = [seat for seat in seats if seat.state is not WorkerState.DEAD]
    return {
        "workers": dict(Counter(seat.state.value for seat in seats)),
        "seats": [{"name": s.name, "state": s.state.value, "load": s.load, "why": s.reason} for s in alive],
        "playing": sum(seat.load for seat in alive),
        "waiting": fleet.queued_episodes,
        "lost": fleet.lost_workers,
    }


class PrometheusTargets(Protocol):
    """Where Prometheus finds the metrics of each node."""

    def __call__(self) -> list[str]: ...
