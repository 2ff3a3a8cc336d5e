"""How a replica exchanges its weights: the order of things, without an engine."""

from __future__ import annotations

import asyncio

import pytest

from vz_ray.config.serve import ServeConfig
from vz_ray.config.timeouts import ServeTimeoutsConfig
from vz_ray.rollout.vllm_engine import EngineFailedError
from vz_ray.serve.weight_swap import WeightSwap

MODEL = "assets/tiny-base"


class FakeEngine:
    """Notes what an engine is told; `fails` at one of them."""

    def __init__(self, fails: str = "") -> None:
        self.calls, self.fails = [], fails

    async def _step(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise EngineFailedError(f"failed at {name}")

    async def pause(self) -> None:
        await self._step("pause")

    async def receive_weights(self, update) -> None:
        await self._step(f"receive {update.version}")

    async def resume(self) -> None:
        await self._step("resume")


@pytest.fixture
def holding() -> WeightSwap:
    holding = WeightSwap(ServeConfig(timeouts=ServeTimeoutsConfig(drain_s=30)), "agent")
    holding.set_initial(MODEL, 1)
    return holding


async def test_requests_end_before_and_new_ones_wait_until_after(holding):
    engine, order = FakeEngine(), []

    async def request(name: str, seconds: float) -> None:
        async with holding.request_slot():
            order.append(f"{name} begins with {len(engine.calls)}")
            await asyncio.sleep(seconds)
            order.append(f"{name} ends with {len(engine.calls)}")

    first = asyncio.create_task(request("first", 0.5))
    await asyncio.sleep(0)
    taking = asyncio.create_task(holding.swap(engine, MODEL, 2))
    while holding._accepting.is_set():  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0.01)
    second = asyncio.create_task(request("second", 0))
    await asyncio.gather(first, taking, second)
    assert engine.calls == ["pause", "receive 2", "resume"]
    assert order == [
        "first begins with 0",
        "first ends with 0",
        "second begins with 3",
        "second ends with 3",
    ]


async def test_an_engine_left_between_two_sets_of_weights_plays_nothing_more(holding):
    with pytest.raises(EngineFailedError):
        await holding.swap(FakeEngine(fails="receive 2"), MODEL, 2)
    assert "loading version 2" in holding.engine_error
    with pytest.raises(EngineFailedError, match="loading version 2"):
        async with holding.request_slot():
            raise AssertionError("it plays")


async def test_what_is_no_checkpoint_leaves_the_engine_alone(holding, tmp_path):
    engine = FakeEngine()
    await holding.swap(engine, str(tmp_path), 2)
    assert engine.calls == []
    assert "version 2 was refused" in holding.swap_error
    assert not holding.engine_error
