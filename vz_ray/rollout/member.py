"""One worker as the crew knows it: what can be asked of it, and how it may be lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import EpisodeId, Sampling, Trajectory
from vz_ray.rollout.engine_stats import Room
from vz_ray.rollout.state import WorkerState
from vz_ray.rollout.worker import WorkerStats
from vz_ray.weights.publisher import Update
from vz_ray.weights.verify import Probe


class WorkerLost(RuntimeError):
    """The worker is gone, or of no use: what it was doing must be done elsewhere."""


class NoPlace(WorkerLost):
    """No node has room for the worker, yet: nothing is wrong with it."""


class RemoteWorker(Protocol):
    """A worker, wherever it runs. Every method may raise `WorkerLost`."""

    name: str
    pulls: bool
    """Its node may be reclaimed at any moment, so it pulls weights rather than being in a group."""
    room: Room | None
    """What it could still take in when it last said so: with each episode and each health check."""

    async def start(self) -> None: ...

    async def play_episode(
        self, task: Task, id: EpisodeId, sampling: Sampling, episode: EpisodeConfig | None
    ) -> Trajectory: ...

    async def pause(self) -> None: ...

    async def init_weights(self, info: dict[str, Any]) -> None: ...

    async def receive(self, update: Update) -> None: ...

    async def thaw(self) -> None: ...

    async def score(self, probe: Probe) -> Sequence[float]: ...

    async def resume(self) -> None: ...

    async def check(self) -> None: ...

    async def notice(self) -> str:
        """Why it will have to go before long, such as its node being reclaimed; empty if nothing is known."""
        ...

    async def stats(self) -> WorkerStats: ...

    async def whereabouts(self) -> tuple[str, str]:
        """What it is doing, in a few words, and the stacks of its threads and tasks."""
        ...

    async def end(self) -> None:
        """Ends it with everything it started, cleanly if it still answers."""
        ...


@dataclass(eq=False)
class Member:
    """A worker and what is known of it.

    `load` counts episodes that it plays or is to play; `served` says that it has been ready.
    """

    worker: RemoteWorker
    state: WorkerState = WorkerState.STARTING
    load: int = 0
    why: str = ""
    extra: bool = False
    served: bool = False
    ended: bool = False

    @property
    def room(self) -> Room | None:
        return self.worker.room


@dataclass(frozen=True, slots=True)
class Seat:
    """A member at one moment, for people and metrics."""

    name: str
    state: WorkerState
    load: int
    why: str
