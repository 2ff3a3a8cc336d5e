"""The driver's heartbeat: asks fleet and decoders how they are, and tells Prometheus and `live.json`.

every few seconds --> fleet.seats, fleet.stats, pool.stats   whoever does not answer in time is left out;
                                                             supervised runs and distillation have no fleet
                  --> gauges of the catalogue, all of them   Ray forgets what is not set again
                  --> live.json, scrape.json
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

from vz_ray.clips import HandleStats, PoolStats
from vz_ray.observe.deadline import within
from vz_ray.observe.live import EPISODE, State
from vz_ray.observe.run_dir import RunDir, write_atomic
from vz_ray.rollout.figures import own_mb
from vz_ray.rollout.member import Seat
from vz_ray.rollout.state import WorkerState
from vz_ray.rollout.worker import WorkerStats
from vz_ray.watch.watch import PHASES, Watch

T = TypeVar("T")

log = logging.getLogger(__name__)

ANSWER_S = 4.0
"""How long fleet and decoders may take to say how they are."""
_SOURCES = {"memory": "hits", "disk": "disk_hits", "decoded": "misses"}
_FAILURES = ("retried", "overdue", "lost", "killed")


class FleetLike(Protocol):
    """What is asked of a fleet."""

    @property
    def waiting(self) -> int: ...

    @property
    def lost(self) -> int: ...

    def seats(self) -> list[Seat]: ...

    async def stats(self) -> list[WorkerStats]: ...


class PoolLike(Protocol):
    """What is asked of a clip pool."""

    def handle(self) -> HandleStats: ...

    async def stats(self) -> PoolStats: ...


class Grown:
    """What counts have grown by since the last look; those of someone who began anew start at 0 again.

    Attributes:
        begun: What was counted before this is set does not count: it was there before the watch.
    """

    def __init__(self) -> None:
        self._last: defaultdict[str, float] = defaultdict(float)
        self.begun = False

    def by(self, key: str, count: float) -> float:
        """Since the last call with this key."""
        before, self._last[key] = self._last[key], count
        if not self.begun:
            return 0.0
        return count - before if count >= before else count


class Heartbeat:
    """Looks at a run every `every_s` seconds, as long as `beat_on` is awaited.

    Args:
        watch: What the run has told.
        run: Where `live.json` and `scrape.json` are written.
        fleet: The rollout workers; None where a run has none.
        pool: The decoders.
        targets: Asked at each beat where the nodes' metrics are: `host:port` of each.
    """

    def __init__(
        self,
        watch: Watch,
        run: RunDir,
        fleet: FleetLike | None,
        pool: PoolLike,
        every_s: float,
        targets: Targets,
    ) -> None:
        self._watch, self._run, self._fleet, self._pool = watch, run, fleet, pool
        self._every_s, self._targets = every_s, targets
        self._grown = Grown()
        self._at = time.monotonic()
        self._told = False
        live = watch.live
        live.host, live.pid, live.every_s = socket.gethostname(), os.getpid(), every_s

    async def beat_on(self) -> None:
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
        self._look_at_clips([worker.clips for worker in workers or ()], pool)
        self._tell()
        self._grown.begun = True
        await asyncio.to_thread(self._write)

    async def end(self, state: State, error: str) -> None:
        """The last word; `error` says what ended it, where it failed."""
        live = self._watch.live
        live.state, live.error, live.left_s = state.value, error, None
        try:
            if self._fleet is not None and live.fleet:
                # The last beat may have been while weights were exchanged.
                live.fleet |= _standing(self._fleet)
            self._tell()
            await asyncio.to_thread(self._write)
        except Exception:
            log.warning("the end of the run could not be noted in %s", self._run.live, exc_info=True)

    async def _ask_fleet(self) -> list[WorkerStats] | None:
        return None if self._fleet is None else await self._ask(self._fleet.stats())

    async def _ask(self, answer: Awaitable[T]) -> T | None:
        try:
            return await within(ANSWER_S, answer, who="fleet or decoders", what="how they are")
        except Exception as error:
            log.debug("no word from fleet or decoders: %s", error)
            return None

    def _look_at_fleet(self, fleet: FleetLike, workers: Sequence[WorkerStats] | None, elapsed: float) -> None:
        watch, meters = self._watch, self._watch.meters
        standing = _standing(fleet)
        for state in WorkerState:
            meters.set("vz_workers", standing["workers"].get(state.value, 0), state=state.value)
        meters.set("vz_episodes_playing", standing["playing"])
        meters.set("vz_episodes_waiting", fleet.waiting)
        meters.add("vz_lost_workers", self._grown.by("lost workers", fleet.lost))
        episodes = self._grown.by("episodes", watch.accepted_episodes) / elapsed
        meters.set("vz_episodes_per_second", episodes)
        known = watch.live.fleet.get("tokens_per_s", 0.0)
        if workers is not None:
            sampled = (self._grown.by(f"tokens {w.name}", w.engine.sampled_tokens) for w in workers)
            known = sum(sampled) / elapsed
        meters.set("vz_tokens_per_second", known)
        watch.live.fleet = {
            **standing,
            "tokens_per_s": round(known, 2),
            "episodes_per_s": round(episodes, 4),
        }

    def _look_at_clips(self, handles: Sequence[HandleStats], pool: PoolStats | None) -> None:
        watch, meters = self._watch, self._watch.meters
        asked = reduce(add, handles, self._pool.handle())
        meters.set("vz_clip_requests", asked.in_flight, state="in_flight")
        meters.set("vz_clip_requests", asked.waiting, state="waiting")
        for kind in _FAILURES:
            meters.add("vz_clip_failures", self._grown.by(f"clips {kind}", getattr(asked, kind)), kind=kind)
        waits = sorted(watch.clip_waits_s)
        shown = watch.live.clips | {
            "in_flight": asked.in_flight,
            "waiting": asked.waiting,
            "failures": asked.overdue + asked.lost + asked.killed,
            "quarantined": asked.quarantined,
            "wait_p50_s": waits[len(waits) // 2] if waits else None,
            "wait_p95_s": waits[int(0.95 * (len(waits) - 1))] if waits else None,
        }
        if pool is not None:
            silent = len(pool.silent)
            shown |= {"decoders": pool.actors, "silent": silent}
            found = {source: getattr(pool.read, name) for source, name in _SOURCES.items()}
            shown["hit_ratio"] = 1 - found["decoded"] / max(1, sum(found.values()))
            for source, count in found.items():
                meters.add("vz_clip_frames", self._grown.by(f"frames {source}", count), source=source)
        meters.set("vz_decoders", shown.get("decoders", 0) - shown.get("silent", 0), state="answering")
        meters.set("vz_decoders", shown.get("silent", 0), state="silent")
        watch.live.clips = shown

    def _tell(self) -> None:
        """Every gauge that does not come from a look at others."""
        watch, meters, live = self._watch, self._watch.meters, self._watch.live
        running = live.state == State.RUNNING
        meters.set("vz_iteration", live.iteration)
        meters.set("vz_iterations", live.iterations)
        for phase in PHASES:
            meters.set("vz_phase", float(running and phase == live.phase), phase=phase)
        meters.set("vz_heartbeat_timestamp_seconds", time.time())
        meters.set("vz_progress_timestamp_seconds", live.progress_s)
        if live.unit != EPISODE:  # those are on disk one by one
            meters.set("vz_checkpoint_timestamp_seconds", live.checkpoint.get("at_s", watch.began_s))
            meters.set("vz_checkpoint_seconds", live.checkpoint.get("seconds", 0.0))
        if math.isfinite(watch.mismatch_limit):
            meters.set("vz_mismatch_kl_limit_nats", watch.mismatch_limit)
        for (name, _), (labels, value) in watch.figures.items():
            meters.set(name, value, **labels)
        live.memory_mb = round(own_mb(), 1)
        meters.set("vz_driver_memory_bytes", live.memory_mb * 1e6)
        for sink, count in watch.dropped().items():
            meters.add("vz_dropped_records", self._grown.by(f"dropped {sink}", count), sink=sink)

    def _write(self) -> None:
        live = self._watch.live
        targets = self._targets()
        if targets != live.scrape or not self._run.scrape.exists():
            group = [{"targets": targets, "labels": {"job": "vz_ray"}}]
            write_atomic(self._run.scrape, json.dumps(group).encode())
        live.scrape = targets
        live.write(self._run.live)


def _standing(fleet: FleetLike) -> dict[str, Any]:
    """How it stands with the workers at this moment, without asking them."""
    seats = fleet.seats()
    alive = [seat for seat in seats if seat.state is not WorkerState.DEAD]
    return {
        "workers": dict(Counter(seat.state.value for seat in seats)),
        "seats": [{"name": s.name, "state": s.state.value, "load": s.load, "why": s.why} for s in alive],
        "playing": sum(seat.load for seat in alive),
        "waiting": fleet.waiting,
        "lost": fleet.lost,
    }


class Targets(Protocol):
    """Where Prometheus finds the metrics of each node."""

    def __call__(self) -> list[str]: ...
