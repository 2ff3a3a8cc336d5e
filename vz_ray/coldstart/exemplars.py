"""Trajectories to imitate: tasks played by someone who knows, through the ordinary episode runner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vz_ray.coldstart.oracle import Oracle, UniformOracle
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.needle.world import SLOTS
from vz_ray.data.task import Task
from vz_ray.episode.protocols import FrameSource, Policy, Ranker
from vz_ray.episode.runner import play
from vz_ray.episode.trajectory import EpisodeId, Sampling, Status, Trajectory
from vz_ray.episode.wire import WireFormat
from vz_ray.observe.errors import UserError

AT_ONCE = 8
"""Episodes played side by side."""


async def play_exemplars(
    tasks: Sequence[Task],
    frames: FrameSource,
    wire: WireFormat,
    config: EpisodeConfig,
    expert: Callable[[Task], Policy],
    ranker: Ranker | None = None,
) -> list[Trajectory]:
    """Each task played once by its expert, in order; `ranker` is for the frame selector `query`.

    Raises:
        UserError: An episode did not end in an answer: the video or the expert is at fault.
    """
    room = asyncio.Semaphore(AT_ONCE)

    async def one(task: Task) -> Trajectory:
        async with room:
            id = EpisodeId(0, task.task_id, 0)
            policy, greedy = expert(task), Sampling()
            played = await play(task, policy, frames, wire, config, id=id, sampling=greedy, ranker=ranker)
        if played.status is not Status.ANSWERED:
            why = played.error or str(played.status)
            raise UserError(f"exemplar of task {task.task_id} on {task.video}: {why}")
        return played

    return list(await asyncio.gather(*(one(task) for task in tasks)))


def zooming(wire: WireFormat, sparse: float = 0.0, seed: int = 0) -> Callable[[Task], Policy]:
    """Experts that zoom along the truth; `sparse` of their zooms are tried at half the right rate."""
    return lambda task: Oracle(task, wire, SLOTS, sparse=sparse, seed=seed)


def answering(wire: WireFormat) -> Callable[[Task], Policy]:
    """Experts that answer at once, saying what the frames they were given show."""
    return lambda task: UniformOracle(task, wire)
