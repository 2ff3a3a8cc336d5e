"""Admission limit: the byte limit holds, owners are served in turn, cancelled requests are skipped."""

from __future__ import annotations

import asyncio
import random

import pytest

from vz_ray.decode.admission import ByteLimiter, request_owner
from vz_ray.utils.timeouts import StepTimeout


async def send(limiter: ByteLimiter, name: str, size: int, log: list[str], seconds: float = 0.0) -> None:
    with request_owner(name):
        async with limiter.reserve(size, f"zoom of {name}"):
            log.append(name)
            await asyncio.sleep(seconds)


async def test_limit_holds_and_all_requests_are_served() -> None:
    limiter, log, rng = ByteLimiter(100, 10.0), [], random.Random(0)
    requests = [send(limiter, str(n % 7), rng.randint(1, 60), log, rng.uniform(0, 0.003)) for n in range(300)]
    await asyncio.gather(*requests)
    assert len(log) == 300
    assert 40 < limiter.peak_bytes <= 100
    assert limiter.reserved_bytes == 0


async def test_owners_are_served_round_robin() -> None:
    limiter, log = ByteLimiter(10, 10.0), []
    greedy = [asyncio.create_task(send(limiter, "greedy", 10, log)) for _ in range(20)]
    await asyncio.sleep(0)
    others = [asyncio.create_task(send(limiter, name, 10, log)) for name in "abc"]
    await asyncio.gather(*greedy, *others)
    assert {log.index(name) for name in "abc"} <= set(range(8))


async def test_request_above_limit_runs_alone_without_starving() -> None:
    limiter, log = ByteLimiter(10, 10.0), []
    first = [asyncio.create_task(send(limiter, f"small{n}", 6, log, 0.01)) for n in range(2)]
    await asyncio.sleep(0)
    large = asyncio.create_task(send(limiter, "large", 50, log, 0.01))
    await asyncio.sleep(0)
    late = [asyncio.create_task(send(limiter, f"late{n}", 1, log)) for n in range(3)]
    await asyncio.gather(*first, large, *late)
    assert log[:3] == ["small0", "small1", "large"]
    assert limiter.peak_bytes == 50


@pytest.mark.parametrize("when", ["waiting", "admitted"])
async def test_cancelled_request_releases_its_turn(when: str) -> None:
    limiter, log = ByteLimiter(10, 10.0), []
    release = asyncio.Event()

    async def holder() -> None:
        async with limiter.reserve(10, "the first"):
            await release.wait()

    held = asyncio.create_task(holder())
    await asyncio.sleep(0)
    cancelled = asyncio.create_task(send(limiter, "cancelled", 10, log))
    waiting = asyncio.create_task(send(limiter, "waiting", 10, log))
    await asyncio.sleep(0)
    if when == "waiting":
        cancelled.cancel()
        release.set()
    else:
        release.set()
        await asyncio.sleep(0)
        cancelled.cancel()  # admitted, but its task has not run yet
    await asyncio.wait_for(asyncio.gather(held, waiting), 10)
    await asyncio.gather(cancelled, return_exceptions=True)
    assert (log, limiter.reserved_bytes) == (["waiting"], 0)


async def test_timeout_names_bytes_in_flight_and_frees_the_queue() -> None:
    limiter = ByteLimiter(10, 0.05)
    async with limiter.reserve(8, "the first"):
        message = r"queue of the decode pool \(8 of 10 bytes .*\) did not finish the second within"
        with pytest.raises(StepTimeout, match=message):
            async with limiter.reserve(8, "the second"):
                pytest.fail("admitted above the limit")
        async with limiter.reserve(2, "the third"):
            assert limiter.reserved_bytes == 10
    assert limiter.reserved_bytes == 0
