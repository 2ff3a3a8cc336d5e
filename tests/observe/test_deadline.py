from __future__ import annotations

import asyncio
import pickle

import pytest

from vz_ray.observe import Overdue, within


async def test_an_overdue_wait_names_whom_it_waited_for():
    with pytest.raises(Overdue, match=r"worker-3 did not finish publish of version 7 within 0.01 s"):
        await within(0.01, asyncio.Event().wait(), who="worker-3", what="publish of version 7")


async def test_an_answer_in_time_is_returned():
    assert await within(60, asyncio.sleep(0, "answer"), who="a", what="b") == "answer"


async def test_the_inner_culprit_is_kept():
    async def inner() -> None:
        await within(0.01, asyncio.Event().wait(), who="decoder-1", what="a clip")

    with pytest.raises(Overdue, match="decoder-1"):
        await within(60, inner(), who="worker-3", what="a turn")


def test_it_survives_the_way_between_actors():
    error = pickle.loads(pickle.dumps(Overdue("a", "b", 1.5)))
    assert (error.who, error.what, error.seconds) == ("a", "b", 1.5)
