"""Fakes for monitoring tests: rollout and decode statistics, a metric recorder, a trajectory."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from vz_ray.decode import DecodeClientStats, DecodePoolStats
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    RejectedZoom,
    RewardParts,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
    ZoomErrorKind,
)
from vz_ray.monitoring.metric_catalog import METRIC_CATALOG
from vz_ray.rollout.engine_stats import EngineStats
from vz_ray.rollout.rollout_worker import WorkerStats
from vz_ray.rollout.worker_handle import WorkerState, WorkerStatus
from vz_ray.video.clip_reader import ReaderStats
from vz_ray.video.frame import ZoomRequest


class RecordingMetrics:
    """Metric recorder that checks each call against the metric catalog."""

    def __init__(self) -> None:
        self.gauges: dict[tuple[str, ...], float] = {}
        self.counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.observed: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def _key(self, kind: str, name: str, labels: dict[str, str]) -> tuple[str, ...]:
        metric = METRIC_CATALOG[name]
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
class FakeRolloutStats:
    """Fake of the part of WorkerPool that the heartbeat reads."""

    queued_episodes: int = 0
    lost_workers: int = 0
    statuses: list[WorkerStatus] = field(default_factory=list)
    workers: list[WorkerStats] = field(default_factory=list)
    hangs: bool = False

    def worker_statuses(self) -> list[WorkerStatus]:
        return self.statuses

    async def worker_stats(self) -> list[WorkerStats]:
        if self.hangs:
            await asyncio.sleep(600)
        return self.workers


@dataclass
class FakeDecodeStats:
    """Fake of the part of DecodePool that the heartbeat reads."""

    client: DecodeClientStats = DecodeClientStats()  # noqa: RUF009 - frozen
    reader: ReaderStats = ReaderStats()  # noqa: RUF009 - frozen
    unresponsive: tuple[str, ...] = ()

    def client_stats(self) -> DecodeClientStats:
        return self.client

    async def stats(self) -> DecodePoolStats:
        return DecodePoolStats(self.reader, self.unresponsive, num_decoders=2)


def make_worker_stats(name: str, tokens: int, decode: DecodeClientStats | None = None) -> WorkerStats:
    engine = EngineStats(sampled_tokens=tokens)
    return WorkerStats(name, 1, 1, 0, 0, 0, 0, engine, decode or DecodeClientStats())


def make_worker_status(name: str, state: WorkerState = WorkerState.READY, load: int = 0) -> WorkerStatus:
    return WorkerStatus(name, state, load, "")


def make_sampled(tokens: int) -> SampledAction:
    ids = tuple(range(tokens))
    return SampledAction(ids, (0.0,) * tokens, (VersionSpan(0, tokens, 7),), SamplingParams(), "end")


def make_trajectory(status: EpisodeStatus = EpisodeStatus.ANSWERED) -> Trajectory:
    """Three turns with a valid and a rejected zoom: 10 s, 3 s before the first turn, 0.5 s of scoring."""
    zoom = ZoomRequest(10.0, 20.0, 2.0)
    rejected = RejectedZoom(ZoomErrorKind.OUT_OF_RANGE, "outside")
    turns = (
        Turn(make_sampled(5), "", zoom, TokenContext(()), (2.0, 1.0)),
        Turn(make_sampled(4), "", rejected, TokenContext(()), (2.5, 0.0)),
        Turn(make_sampled(3), "", None, None, (1.5, 0.0)),
    )
    reward = RewardParts(1.4, 1.0, 1.0, 1.0)
    return Trajectory(
        EpisodeId(3, "task", 1),
        "format-hash",
        TokenContext(()),
        turns,
        status,
        worker="rollout-2",
        seconds=10.0,
        reward=reward,
        error="no video" if status is EpisodeStatus.FAILED else "",
        extra={"reward_s": 0.5},
    )
