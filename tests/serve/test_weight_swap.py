"""Weight swaps of a replica without an engine: order of calls, errors."""

from __future__ import annotations

import asyncio

import pytest

from vz_ray.config.serve import ServeConfig
from vz_ray.config.timeouts import ServeTimeoutsConfig
from vz_ray.rollout.vllm_process import EngineFailedError
from vz_ray.serve.weight_swap import WeightSwap

MODEL = "assets/tiny-base"


class FakeEngine:
    """Records its calls; raises in the call `fails`."""

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
def weight_swap() -> WeightSwap:
    weight_swap = WeightSwap(ServeConfig(timeouts=ServeTimeoutsConfig(drain_s=30)), "agent")
    weight_swap.set_initial(MODEL, 1)
    return weight_swap


async def test_swap_drains_requests_and_blocks_new_ones(weight_swap):
    engine, order = FakeEngine(), []

    async def request(name: str, seconds: float) -> None:
        async with weight_swap.request_slot():
            order.append(f"{name} begins with {len(engine.calls)}")
            await asyncio.sleep(seconds)
            order.append(f"{name} ends with {len(engine.calls)}")

    first = asyncio.create_task(request("first", 0.5))
    await asyncio.sleep(0)
    taking = asyncio.create_task(weight_swap.swap(engine, MODEL, 2))
    while weight_swap._accepting.is_set():  # noqa: ASYNC110 - there is no event to wait for
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


async def test_partial_swap_disables_the_engine(weight_swap):
    with pytest.raises(EngineFailedError):
        await weight_swap.swap(FakeEngine(fails="receive 2"), MODEL, 2)
    assert "loading version 2" in weight_swap.engine_error
    with pytest.raises(EngineFailedError, match="loading version 2"):
        async with weight_swap.request_slot():
            raise AssertionError("it plays")


async def test_invalid_checkpoint_leaves_the_engine_unchanged(weight_swap, tmp_path):
    engine = FakeEngine()
    await weight_swap.swap(engine, str(tmp_path), 2)
    assert engine.calls == []
    assert "version 2 was refused" in weight_swap.swap_error
    assert not weight_swap.engine_error
