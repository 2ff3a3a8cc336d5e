"""Translation of Ray errors: every loss of a worker becomes a `WorkerLostError`."""

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
    """Build an error with Ray's message format: a general line, the actor's ids, then the cause."""
    error = ActorDiedError()
    error.error_msg = "\n".join([ActorDiedError.BASE_ERROR_MSG, "\tpid: 17", "\tip: 10.0.0.3", *lines])
    error._preempted = preempted
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            died("The actor is dead because its worker process has died."),
            "rollout-3 died during check_health: The",
        ),
        (
            died("Its node has died.", "\tpreempted: spot", preempted=True),
            "was preempted with its node during",
        ),
        (
            ActorUnavailableError("connection reset", b"\1" * 16),
            "could not be reached during check_health: The actor",
        ),
        (ObjectReconstructionFailedError("ab" * 28), "was lost with its result during check_health"),
        (RaySystemError("no raylet"), "rollout-3 died during check_health: System error: no raylet"),
    ],
)
async def test_ray_errors_become_worker_lost_errors(error: RayError, message: str) -> None:
    def failing_call() -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        future.set_exception(error)
        return future

    worker = object.__new__(RayWorkerClient)
    worker.name = "rollout-3"
    worker._actor = SimpleNamespace(check_health=SimpleNamespace(remote=failing_call))
    with pytest.raises(WorkerLostError, match=message):
        await worker.check_health()
