"""What Ray's errors mean for the fleet: whatever became of a worker, what it played is played elsewhere."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectReconstructionFailedError,
    RayError,
    RaySystemError,
)

from vz_ray.rollout.ray_worker import RayWorkerClient
from vz_ray.rollout.worker_handle import WorkerLostError


def died(*lines: str, preempted: bool = False) -> ActorDiedError:
    """As Ray words it: a general line, the actor's ids, then what happened."""
    error = ActorDiedError()
    error.error_msg = "\n".join([ActorDiedError.BASE_ERROR_MSG, "\tpid: 17", "\tip: 10.0.0.3", *lines])
    error._preempted = preempted
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (died("The actor is dead because its worker process has died."), "rollout-3 died during check: The"),
        (
            died("Its node has died.", "\tpreempted: spot", preempted=True),
            "was reclaimed with its node during",
        ),
        (
            ActorUnavailableError("connection reset", b"\1" * 16),
            "could not be reached during check: The actor",
        ),
        (ObjectReconstructionFailedError("ab" * 28), "was lost with its answer during check"),
        (RaySystemError("no raylet"), "rollout-3 died during check: System error: no raylet"),
    ],
)
async def test_every_way_of_losing_a_worker_is_told_apart_and_means_that_it_is_lost(
    error: RayError, said: str
) -> None:
    def answer() -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        future.set_exception(error)
        return future

    worker = object.__new__(RayWorkerClient)
    worker.name = "rollout-3"
    worker._actor = SimpleNamespace(check=SimpleNamespace(remote=answer))
    with pytest.raises(WorkerLostError, match=said):
        await worker.check_health()
