"""One worker as the crew knows it: what can be asked of it, and how it may be lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, SamplingParams, Trajectory
from vz_ray.rollout.engine_stats import WorkerCapacity
from vz_ray.rollout.rollout_worker import WorkerStats
from vz_ray.rollout.worker_state import WorkerState
from vz_ray.weight_sync.parity_probe import ParityProbe
from vz_ray.weight_sync.publisher import WeightUpdate


class WorkerLostError(RuntimeError):
    """The worker is gone, or of no use: what it was doing must be done elsewhere."""


class WorkerUnschedulableError(WorkerLostError):
    """No node has room for the worker, yet: nothing is wrong with it."""


class WorkerClient(Protocol):
    """A worker, wherever it runs. Every method may raise `WorkerLostError`."""

    name: str
    pulls_weights: bool
    """Its node may be reclaimed at any moment, so it pulls weights rather than being in a group."""
    capacity: WorkerCapacity | None
    """What it could still take in when it last said so: with each episode and each health check."""

    async def start(self) -> None: ...

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
    ) -> Trajectory: ...

    async def pause(self) -> None: ...

    async def init_weight_transfer(self, info: dict[str, Any]) -> None: ...

    async def receive_weights(self, update: WeightUpdate) -> None: ...

    async def resume_engine(self) -> None: ...

    async def score_probe(self, probe: ParityProbe) -> Sequence[float]: ...

    async def resume(self) -> None: ...

    async def check_health(self) -> None: ...

    async def drain_reason(self) -> str:
        """Why it will have to go before long, such as its node being reclaimed; empty if nothing is known."""
        ...

    async def worker_stats(self) -> WorkerStats: ...

    async def describe_state(self) -> tuple[str, str]:
        """What it is doing, in a few words, and the stacks of its threads and tasks."""
        ...

    async def terminate(self) -> None:
        """Ends it with everything it started, cleanly if it still answers."""
        ...


@dataclass(eq=False)
class WorkerHandle:
    """A worker and what is known of it.

    `load` counts episodes that it plays or is to play; `was_ready` says that it has been ready.
    """

    client: WorkerClient
    state: WorkerState = WorkerState.STARTING
    load: int = 0
    reason: str = ""
    is_extra: bool = False
    was_ready: bool = False
    terminated: bool = False

    @property
    def capacity(self) -> WorkerCapacity | None:
        return self.client.capacity


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A member at one moment, for people and metrics."""

    name: str
    state: WorkerState
    load: int
    reason: str
