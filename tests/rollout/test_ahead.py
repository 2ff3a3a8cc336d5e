"""Batches begin as early as the bound on staleness allows, and no earlier."""

from __future__ import annotations

import asyncio

import pytest

from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    Group,
    Sampled,
    Sampling,
    Status,
    Trajectory,
    Turn,
    VersionSpan,
    Written,
)
from vz_ray.rollout.ahead import Ahead, staleness
from vz_ray.rollout.collect import Batch


class Players:
    """Plays until told otherwise; notes the version that the engines held when each batch began."""

    def __init__(self) -> None:
        self.version, self.began, self.ended = 0, {}, []
        self.hold = asyncio.Event()

    async def play(self, iteration: int) -> Batch:
        self.began[iteration] = self.version
        try:
            await self.hold.wait()
            return Batch(kept=[iteration])
        finally:
            self.ended.append(iteration)


@pytest.mark.parametrize("most", [0, 1, 3])
async def test_a_batch_begins_when_at_most_so_many_updates_are_to_come(most: int) -> None:
    players = Players()
    players.hold.set()
    async with Ahead(players.play, most, end=8) as ahead:
        for iteration in range(8):
            assert (await ahead.batch(iteration)).kept == [iteration]
            await asyncio.sleep(0)
            players.version += 1
    assert players.began == {j: max(0, j - most) for j in range(8)}


async def test_what_is_under_way_ends_with_the_block() -> None:
    players = Players()
    async with Ahead(players.play, 2, end=10) as ahead:
        waiting = asyncio.create_task(ahead.batch(4))
        await asyncio.sleep(0.01)
        waiting.cancel()
    assert sorted(players.ended) == [4, 5, 6]


async def test_a_batch_that_fails_says_so_and_the_others_end() -> None:
    async def play(iteration: int) -> Batch:
        if iteration == 1:
            raise RuntimeError("no worker")
        return Batch()

    async with Ahead(play, 1, end=5) as ahead:
        await ahead.batch(0)
        with pytest.raises(RuntimeError, match="no worker"):
            await ahead.batch(1)


def test_tokens_are_counted_by_their_age() -> None:
    spans = (VersionSpan(0, 3, 6), VersionSpan(3, 5, 7))
    turns = (
        Turn(Sampled((1,) * 5, (-1.0,) * 5, spans, Sampling(), "zoom"), "", None, None),
        Turn(Written("", (1, 2)), "", None, None),
    )
    played = Trajectory(EpisodeId(0, "t", 0), "", Context(()), turns, Status.ANSWERED)
    assert staleness([Group("t", (played, played))], 8) == {1: 4, 2: 6}
