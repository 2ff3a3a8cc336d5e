"""A fleet and a pool that say what they are told to, meters that remember, and an episode."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from vz_ray.clips import HandleStats, PoolStats
from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    RewardParts,
    Sampled,
    Sampling,
    Status,
    Trajectory,
    Turn,
    VersionSpan,
    ZoomFault,
    ZoomRefused,
)
from vz_ray.observe.catalogue import CATALOGUE
from vz_ray.rollout.engine_stats import EngineStats
from vz_ray.rollout.member import Seat
from vz_ray.rollout.state import WorkerState
from vz_ray.rollout.worker import WorkerStats
from vz_ray.video.clip_reader import ReadStats
from vz_ray.video.frame import Zoom


class Remembering:
    """Meters that hold the catalogue's rules against whoever uses them."""

    def __init__(self) -> None:
        self.gauges: dict[tuple[str, ...], float] = {}
        self.counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.observed: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def _key(self, kind: str, name: str, labels: dict[str, str]) -> tuple[str, ...]:
        metric = CATALOGUE[name]
        assert metric.kind == kind, name
        assert set(metric.labels) == {"run", *labels}, name
        return (name, *labels.values())

    def set(self, name: str, value: float, **labels: str) -> None:
        self.gauges[self._key("gauge", name, labels)] = value

    def add(self, name: str, amount: float, **labels: str) -> None:
        assert amount >= 0
        self.counts[self._key("counter", name, labels)] += amount

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.observed[self._key("histogram", name, labels)].append(value)


@dataclass
class SomeFleet:
    """As the heartbeat sees it."""

    waiting: int = 0
    lost: int = 0
    there: list[Seat] = field(default_factory=list)
    workers: list[WorkerStats] = field(default_factory=list)
    hangs: bool = False

    def seats(self) -> list[Seat]:
        return self.there

    async def stats(self) -> list[WorkerStats]:
        if self.hangs:
            await asyncio.sleep(600)
        return self.workers


@dataclass
class SomePool:
    """As the heartbeat sees it."""

    own: HandleStats = HandleStats()  # noqa: RUF009 - frozen
    read: ReadStats = ReadStats()  # noqa: RUF009 - frozen
    silent: tuple[str, ...] = ()

    def handle(self) -> HandleStats:
        return self.own

    async def stats(self) -> PoolStats:
        return PoolStats(self.read, self.silent, 0, 0, 0, 0, actors=2)


def worker(name: str, tokens: int, clips: HandleStats | None = None) -> WorkerStats:
    engine = EngineStats(sampled_tokens=tokens)
    return WorkerStats(name, 1, 1, 0, 0, 0.0, 0.0, engine, clips or HandleStats())


def seat(name: str, state: WorkerState = WorkerState.READY, load: int = 0) -> Seat:
    return Seat(name, state, load, "")


def sampled(tokens: int) -> Sampled:
    ids = tuple(range(tokens))
    return Sampled(ids, (0.0,) * tokens, (VersionSpan(0, tokens, 7),), Sampling(), "end")


def episode(status: Status = Status.ANSWERED) -> Trajectory:
    """Two turns, a zoom and a refused one: 10 s, of which 3 s until the first turn; its reward took 0.5 s."""
    zoom = Zoom(10.0, 20.0, 2.0)
    refused = ZoomRefused(ZoomFault.OUTSIDE, "outside")
    turns = (
        Turn(sampled(5), "", zoom, Context(()), (2.0, 1.0)),
        Turn(sampled(4), "", refused, Context(()), (2.5, 0.0)),
        Turn(sampled(3), "", None, None, (1.5, 0.0)),
    )
    reward = RewardParts(1.4, 1.0, 1.0, 1.0)
    return Trajectory(
        EpisodeId(3, "task", 1),
        "wire",
        Context(()),
        turns,
        status,
        worker="rollout-2",
        seconds=10.0,
        reward=reward,
        error="no video" if status is Status.FAILED else "",
        extra={"reward_s": 0.5},
    )
