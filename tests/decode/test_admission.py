"""The gate in front of the pool: the cap holds, askers take turns, nobody who left is waited for."""

from __future__ import annotations

import asyncio
import random

import pytest

from vz_ray.decode.admission import ByteLimiter, request_owner
from vz_ray.utils.timeouts import StepTimeout


async def ask(gate: ByteLimiter, name: str, size: int, log: list[str], seconds: float = 0.0) -> None:
    with request_owner(name):
        async with gate.reserve(size, f"zoom of {name}"):
            log.append(name)
            await asyncio.sleep(seconds)


async def test_the_cap_holds_and_all_are_served() -> None:
    gate, log, draw = ByteLimiter(100, 10.0), [], random.Random(0)
    asked = [ask(gate, str(n % 7), draw.randint(1, 60), log, draw.uniform(0, 0.003)) for n in range(300)]
    await asyncio.gather(*asked)
    assert len(log) == 300
    assert 40 < gate.peak_bytes <= 100
    assert gate.reserved_bytes == 0


async def test_askers_take_turns_however_much_one_of_them_asks() -> None:
    gate, log = ByteLimiter(10, 10.0), []
    greedy = [asyncio.create_task(ask(gate, "greedy", 10, log)) for _ in range(20)]
    await asyncio.sleep(0)
    others = [asyncio.create_task(ask(gate, name, 10, log)) for name in "abc"]
    await asyncio.gather(*greedy, *others)
    assert {log.index(name) for name in "abc"} <= set(range(8))


async def test_a_large_request_is_not_overtaken_for_ever_and_one_above_the_cap_goes_alone() -> None:
    gate, log = ByteLimiter(10, 10.0), []
    first = [asyncio.create_task(ask(gate, f"small{n}", 6, log, 0.01)) for n in range(2)]
    await asyncio.sleep(0)
    large = asyncio.create_task(ask(gate, "large", 50, log, 0.01))
    await asyncio.sleep(0)
    late = [asyncio.create_task(ask(gate, f"late{n}", 1, log)) for n in range(3)]
    await asyncio.gather(*first, large, *late)
    assert log[:3] == ["small0", "small1", "large"]
    assert gate.peak_bytes == 50


@pytest.mark.parametrize("when", ["waiting", "admitted"])
async def test_who_gives_up_is_not_waited_for(when: str) -> None:
    gate, log = ByteLimiter(10, 10.0), []
    release = asyncio.Event()

    async def holder() -> None:
        async with gate.reserve(10, "the first"):
            await release.wait()

    holding = asyncio.create_task(holder())
    await asyncio.sleep(0)
    leaving = asyncio.create_task(ask(gate, "leaving", 10, log))
    staying = asyncio.create_task(ask(gate, "staying", 10, log))
    await asyncio.sleep(0)
    if when == "waiting":
        leaving.cancel()
        release.set()
    else:
        release.set()
        await asyncio.sleep(0)
        leaving.cancel()  # its turn has come, but it has not run since
    await asyncio.wait_for(asyncio.gather(holding, staying), 10)
    await asyncio.gather(leaving, return_exceptions=True)
    assert (log, gate.reserved_bytes) == (["staying"], 0)


async def test_a_turn_that_does_not_come_is_named_and_nobody_else_waits_for_it() -> None:
    gate = ByteLimiter(10, 0.05)
    async with gate.reserve(8, "the first"):
        named = r"the gate of the clip pool \(8 of 10 bytes in flight .*\) did not finish the second within"
        with pytest.raises(StepTimeout, match=named):
            async with gate.reserve(8, "the second"):
                pytest.fail("there was no room")
        async with gate.reserve(2, "the third"):
            assert gate.reserved_bytes == 10
    assert gate.reserved_bytes == 0
