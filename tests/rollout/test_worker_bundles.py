"""Assignment of placement group bundles to workers."""

from __future__ import annotations

import asyncio
from typing import Any

from vz_ray.rollout.worker_bundles import WorkerBundles


async def test_replacement_waits_for_the_bundle_of_the_lost_worker() -> None:
    group: Any = object()

    async def reserve() -> Any:
        return group

    bundles = WorkerBundles(reserve, 2)
    assert [await bundles.take() for _ in range(2)] == [0, 1]
    replacement = asyncio.create_task(bundles.take())
    await asyncio.sleep(0)
    assert not replacement.done()
    bundles.give_back(0)
    assert await replacement == 0
    strategy = await bundles.scheduling_strategy(1)
    assert (strategy.placement_group, strategy.placement_group_bundle_index) == (group, 1)


async def test_cancelled_start_keeps_no_bundle() -> None:
    async def reserve() -> Any:
        return None

    bundles = WorkerBundles(reserve, 1)
    assert await bundles.take() == 0
    waiting = asyncio.create_task(bundles.take())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    bundles.give_back(0)
    assert await bundles.take() == 0
