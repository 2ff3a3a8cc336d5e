"""Timeouts that name target and operation."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from vz_ray.utils.timeouts import StepTimeout, with_timeout


async def test_timeout_names_target_and_operation():
    with pytest.raises(StepTimeout, match=r"worker-3 did not finish publish of version 7 within 0.01 s"):
        await with_timeout(asyncio.Event().wait(), 0.01, target="worker-3", operation="publish of version 7")


async def test_result_in_time_is_returned():
    assert await with_timeout(asyncio.sleep(0, "answer"), 60, target="a", operation="b") == "answer"


async def test_inner_timeout_is_kept():
    async def inner() -> None:
        await with_timeout(asyncio.Event().wait(), 0.01, target="decoder-1", operation="a clip")

    with pytest.raises(StepTimeout, match="decoder-1"):
        await with_timeout(inner(), 60, target="worker-3", operation="a turn")


def test_step_timeout_survives_pickling():
    error = pickle.loads(pickle.dumps(StepTimeout("a", "b", 1.5)))
    assert (error.target, error.operation, error.timeout_s) == ("a", "b", 1.5)
