"""Prefetching of batches within the staleness bound."""

from __future__ import annotations

import asyncio

import pytest

from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    Group,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
)
from vz_ray.rollout.batch_collector import RolloutBatch
from vz_ray.rollout.batch_prefetcher import BatchPrefetcher, staleness_histogram


class FakeCollector:
    """Collect until released. Record the engines' weight version at the start of each batch."""

    def __init__(self) -> None:
        self.version, self.started, self.finished = 0, {}, []
        self.release = asyncio.Event()

    async def collect(self, step: int) -> RolloutBatch:
        self.started[step] = self.version
        try:
            await self.release.wait()
            return RolloutBatch(kept=[step])
        finally:
            self.finished.append(step)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_batches_start_within_the_staleness_bound(max_staleness: int) -> None:
    collector = FakeCollector()
    collector.release.set()
    async with BatchPrefetcher(collector.collect, max_staleness, max_steps=8) as prefetcher:
        for step in range(8):
            assert (await prefetcher.get_batch(step)).kept == [step]
            await asyncio.sleep(0)
            collector.version += 1
    assert collector.started == {step: max(0, step - max_staleness) for step in range(8)}


async def test_exit_cancels_batches_in_flight() -> None:
    collector = FakeCollector()
    async with BatchPrefetcher(collector.collect, 2, max_steps=10) as prefetcher:
        waiting = asyncio.create_task(prefetcher.get_batch(4))
        await asyncio.sleep(0.01)
        waiting.cancel()
    assert sorted(collector.finished) == [4, 5, 6]


async def test_batch_failure_propagates_and_cancels_others() -> None:
    async def collect(step: int) -> RolloutBatch:
        if step == 1:
            raise RuntimeError("no worker")
        return RolloutBatch()

    async with BatchPrefetcher(collect, 1, max_steps=5) as prefetcher:
        await prefetcher.get_batch(0)
        with pytest.raises(RuntimeError, match="no worker"):
            await prefetcher.get_batch(1)


def test_staleness_histogram_counts_tokens() -> None:
    spans = (VersionSpan(0, 3, 6), VersionSpan(3, 5, 7))
    turns = (
        Turn(SampledAction((1,) * 5, (-1.0,) * 5, spans, SamplingParams(), "zoom"), "", None, None),
        Turn(ExternalAction("", (1, 2)), "", None, None),
    )
    trajectory = Trajectory(EpisodeId(0, "t", 0), "", TokenContext(()), turns, EpisodeStatus.ANSWERED)
    assert staleness_histogram([Group("t", (trajectory, trajectory))], 8) == {1: 4, 2: 6}
