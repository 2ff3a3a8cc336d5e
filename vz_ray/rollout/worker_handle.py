"""State of one rollout worker as seen by the driver, and the interface to call it.

    STARTING --started--> SYNCING --synced--> READY --drain--> DRAINING --empty--> DEAD
                           ^   ^----publish-----' |
                           '--publish-- ASLEEP <--' sleep
    every state --died--> DEAD; STARTING, SYNCING and ASLEEP --drain--> DEAD (no episodes to finish)

Only a READY worker accepts new episodes. A worker becomes READY only with the current weights. A
DEAD worker never returns: its replacement gets a new name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, SamplingParams, Trajectory
from vz_ray.rollout.engine_stats import WorkerCapacity
from vz_ray.rollout.rollout_worker import WorkerStats
from vz_ray.utils.timeouts import with_timeout
from vz_ray.weight_sync import EngineClient

log = logging.getLogger(__name__)

_TERMINATE_TIMEOUT_S = 60.0


class WorkerState(StrEnum):
    STARTING = "starting"
    """The engine loads."""
    SYNCING = "syncing"
    """The worker receives weights; its episodes are paused."""
    READY = "ready"
    """The worker accepts new episodes."""
    ASLEEP = "asleep"
    """The learner uses the worker's GPU."""
    DRAINING = "draining"
    """The worker finishes its episodes and accepts no new ones."""
    DEAD = "dead"
    """The worker has terminated."""


class WorkerEvent(StrEnum):
    STARTED = "started"
    SYNCED = "synced"
    PUBLISH = "publish"
    SLEEP = "sleep"
    DRAIN = "drain"
    EMPTY = "empty"
    DIED = "died"


_TRANSITIONS: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (WorkerState.STARTING, WorkerEvent.STARTED): WorkerState.SYNCING,
    (WorkerState.SYNCING, WorkerEvent.SYNCED): WorkerState.READY,
    (WorkerState.READY, WorkerEvent.PUBLISH): WorkerState.SYNCING,
    (WorkerState.READY, WorkerEvent.SLEEP): WorkerState.ASLEEP,
    (WorkerState.ASLEEP, WorkerEvent.PUBLISH): WorkerState.SYNCING,
    (WorkerState.READY, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.ASLEEP, WorkerEvent.DRAIN): WorkerState.DEAD,
    (WorkerState.STARTING, WorkerEvent.DRAIN): WorkerState.DEAD,
    (WorkerState.SYNCING, WorkerEvent.DRAIN): WorkerState.DEAD,
    (WorkerState.DRAINING, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.DRAINING, WorkerEvent.EMPTY): WorkerState.DEAD,
    **{(state, WorkerEvent.DIED): WorkerState.DEAD for state in WorkerState},
}


class InvalidTransitionError(RuntimeError):
    """An event that the current state does not allow: a bug in the worker pool."""


def next_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """Return the state after `event`.

    Raises:
        InvalidTransitionError: `state` does not allow `event`.
    """
    try:
        return _TRANSITIONS[state, event]
    except KeyError:
        raise InvalidTransitionError(f"a worker that is {state} cannot have event {event}") from None


class WorkerLostError(RuntimeError):
    """The worker is dead or unusable. Its episodes must be retried on another worker."""


class WorkerUnschedulableError(WorkerLostError):
    """No node currently has the resources for the worker."""


class WorkerClient(EngineClient, Protocol):
    """Client of a rollout worker, local or remote. Every method may raise `WorkerLostError`."""

    name: str
    pulls_weights: bool
    capacity: WorkerCapacity | None
    """Last reported capacity; updated with each episode and each health check."""

    async def start(self) -> None: ...

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
        completed_turns: bytes = b"",
    ) -> Trajectory: ...

    async def read_completed_turns(self) -> Mapping[EpisodeId, bytes]:
        """Return the turns of running episodes that completed one since the last call."""
        ...

    async def check_health(self) -> None: ...

    async def drain_reason(self) -> str:
        """Return why the worker must drain, for example a preemption notice; empty by default."""
        ...

    async def worker_stats(self) -> WorkerStats: ...

    async def describe_state(self) -> tuple[str, str]:
        """Return a one-line summary of the current work, and the stacks of all threads and tasks."""
        ...

    async def terminate(self) -> None:
        """Terminate the worker and its child processes, gracefully if it still responds."""
        ...


@dataclass(eq=False)
class WorkerHandle:
    """The pool's record of one worker.

    Attributes:
        client: Client of the worker.
        state: Current state.
        load: Episodes assigned to the worker, queued or running.
        reason: Why the worker drains or died.
        is_extra: Whether the worker was started beyond the required number.
        was_ready: Whether the worker has ever been READY.
        terminated: Whether its processes have been terminated.
        completed_turns: Last reported turns of each of its running episodes.
    """

    client: WorkerClient
    state: WorkerState = WorkerState.STARTING
    load: int = 0
    reason: str = ""
    is_extra: bool = False
    was_ready: bool = False
    terminated: bool = False
    completed_turns: dict[EpisodeId, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def capacity(self) -> WorkerCapacity | None:
        return self.client.capacity

    def status(self) -> WorkerStatus:
        return WorkerStatus(self.name, self.state, self.load, self.reason)

    async def terminate(self) -> None:
        """Terminate the worker's processes. Failures are logged. Idempotent."""
        if self.terminated:
            return
        try:
            await with_timeout(self.client.terminate(), _TERMINATE_TIMEOUT_S, target=self.name, operation="terminating")
        except Exception as error:
            log.warning("Could not terminate worker %s cleanly: %s", self.name, error)
        self.terminated = True


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Snapshot of a worker handle, for logs and metrics."""

    name: str
    state: WorkerState
    load: int
    reason: str
