"""Batches begin as early as the bound on staleness allows, and no earlier."""

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
    """Plays until told otherwise; notes the version that the engines held when each batch began."""

    def __init__(self) -> None:
        self.version, self.began, self.ended = 0, {}, []
        self.hold = asyncio.Event()

    async def collect(self, iteration: int) -> RolloutBatch:
        self.began[iteration] = self.version
        try:
            await self.hold.wait()
            return RolloutBatch(kept=[iteration])
        finally:
            self.ended.append(iteration)


@pytest.mark.parametrize("most", [0, 1, 3])
async def test_batches_start_within_the_staleness_bound(most: int) -> None:
    players = FakeCollector()
    players.hold.set()
    async with BatchPrefetcher(players.collect, most, max_steps=8) as ahead:
        for iteration in range(8):
            assert (await ahead.get_batch(iteration)).kept == [iteration]
            await asyncio.sleep(0)
            players.version += 1
    assert players.began == {j: max(0, j - most) for j in range(8)}


async def test_exit_cancels_batches_in_flight() -> None:
    players = FakeCollector()
    async with BatchPrefetcher(players.collect, 2, max_steps=10) as ahead:
        waiting = asyncio.create_task(ahead.get_batch(4))
        await asyncio.sleep(0.01)
        waiting.cancel()
    assert sorted(players.ended) == [4, 5, 6]


async def test_batch_failure_propagates_and_cancels_others() -> None:
    async def play(iteration: int) -> RolloutBatch:
        if iteration == 1:
            raise RuntimeError("no worker")
        return RolloutBatch()

    async with BatchPrefetcher(play, 1, max_steps=5) as ahead:
        await ahead.get_batch(0)
        with pytest.raises(RuntimeError, match="no worker"):
            await ahead.get_batch(1)


def test_staleness_histogram_counts_tokens() -> None:
    spans = (VersionSpan(0, 3, 6), VersionSpan(3, 5, 7))
    turns = (
        Turn(SampledAction((1,) * 5, (-1.0,) * 5, spans, SamplingParams(), "zoom"), "", None, None),
        Turn(ExternalAction("", (1, 2)), "", None, None),
    )
    played = Trajectory(EpisodeId(0, "t", 0), "", TokenContext(()), turns, EpisodeStatus.ANSWERED)
    assert staleness_histogram([Group("t", (played, played))], 8) == {1: 4, 2: 6}
