"""Bundles of a placement group that workers share with the learner, one per GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class WorkerBundles:
    """Assigns each worker the bundle of one learner rank. A dead worker's bundle goes to its replacement.

    Args:
        reserve: Return the placement group of the learner; wait until Ray has placed it.
        count: Number of bundles.
    """

    def __init__(self, reserve: Callable[[], Awaitable[PlacementGroup]], count: int) -> None:
        self._reserve = reserve
        self._free: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        for index in range(count):
            self._free.put_nowait(index)

    async def take(self) -> int:
        """Return the index of a bundle without a worker; wait until there is one."""
        return await self._free.get()

    def give_back(self, index: int) -> None:
        """Free the bundle of a worker that has ended."""
        self._free.put_nowait(index)

    async def scheduling_strategy(self, index: int) -> PlacementGroupSchedulingStrategy:
        """Return the strategy that places an actor in a bundle."""
        return PlacementGroupSchedulingStrategy(await self._reserve(), placement_group_bundle_index=index)
