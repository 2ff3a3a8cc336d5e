"""Trajectories to imitate: tasks played by someone who knows, through the ordinary episode runner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import FrameRanker, FrameSource, Policy
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams, Trajectory
from vz_ray.needle.needle_video import SLOTS_PER_SHOT
from vz_ray.needle.oracle import UniformOracle, ZoomOracle
from vz_ray.utils.errors import UserError

MAX_CONCURRENT_EPISODES = 8
"""Episodes played side by side."""


async def collect_exemplars(
    tasks: Sequence[Task],
    frames: FrameSource,
    wire: ChatFormat,
    config: EpisodeConfig,
    make_policy: Callable[[Task], Policy],
    ranker: FrameRanker | None = None,
) -> list[Trajectory]:
    """Each task played once by its expert, in order; `ranker` is for the frame selector `query`.

    Raises:
        UserError: An episode did not end in an answer: the video or the expert is at fault.
    """
    room = asyncio.Semaphore(MAX_CONCURRENT_EPISODES)

    async def one(task: Task) -> Trajectory:
        async with room:
            id = EpisodeId(0, task.task_id, 0)
            policy, greedy = make_policy(task), SamplingParams()
            played = await run_episode(
                task, policy, frames, wire, config, episode_id=id, sampling_params=greedy, ranker=ranker
            )
        if played.status is not EpisodeStatus.ANSWERED:
            why = played.error or str(played.status)
            raise UserError(f"exemplar of task {task.task_id} on {task.video}: {why}")
        return played

    return list(await asyncio.gather(*(one(task) for task in tasks)))


def zoom_oracle_factory(
    wire: ChatFormat, half_rate_share: float = 0.0, seed: int = 0
) -> Callable[[Task], Policy]:
    """Experts that zoom along the truth; `sparse_zoom_share` of their zooms are tried at half the right rate."""
    return lambda task: ZoomOracle(task, wire, SLOTS_PER_SHOT, half_rate_share=half_rate_share, seed=seed)


def uniform_oracle_factory(wire: ChatFormat) -> Callable[[Task], Policy]:
    """Experts that answer at once, saying what the frames they were given show."""
    return lambda task: UniformOracle(task, wire)
