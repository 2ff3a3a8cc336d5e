from __future__ import annotations

import asyncio
import pickle

import pytest

from vz_ray.utils.timeouts import StepTimeout, with_timeout


async def test_an_overdue_wait_names_whom_it_waited_for():
    with pytest.raises(StepTimeout, match=r"worker-3 did not finish publish of version 7 within 0.01 s"):
        await with_timeout(asyncio.Event().wait(), 0.01, target="worker-3", operation="publish of version 7")


async def test_an_answer_in_time_is_returned():
    assert await with_timeout(asyncio.sleep(0, "answer"), 60, target="a", operation="b") == "answer"


async def test_the_inner_culprit_is_kept():
    async def inner() -> None:
        await with_timeout(asyncio.Event().wait(), 0.01, target="decoder-1", operation="a clip")

    with pytest.raises(StepTimeout, match="decoder-1"):
        await with_timeout(inner(), 60, target="worker-3", operation="a turn")


def test_it_survives_the_way_between_actors():
    error = pickle.loads(pickle.dumps(StepTimeout("a", "b", 1.5)))
    assert (error.who, error.what, error.seconds) == ("a", "b", 1.5)
