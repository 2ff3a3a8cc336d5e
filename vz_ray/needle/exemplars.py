"""Exemplars: episodes of scripted policies, through the normal episode runner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vz_ray.config.episode import EpisodeConfig
from vz_ray.distill.teacher_runner import PrefixReplay, TeacherJob
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import FrameRanker, FrameSource, Policy
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeStatus, SamplingParams, Trajectory
from vz_ray.needle.needle_video import SLOTS_PER_SHOT
from vz_ray.needle.oracle import UniformOracle, ZoomOracle
from vz_ray.utils.errors import UserError

MAX_CONCURRENT_EPISODES = 8


async def collect_exemplars(
    tasks: Sequence[Task],
    frames: FrameSource,
    chat_format: ChatFormat,
    config: EpisodeConfig,
    make_policy: Callable[[Task], Policy],
    ranker: FrameRanker | None = None,
) -> list[Trajectory]:
    """Run one episode per task and return the trajectories in order.

    Args:
        tasks: Tasks with ground truth.
        frames: Source of the frames.
        chat_format: Encodes the episodes.
        config: Limits of an episode.
        make_policy: Creates the scripted policy of a task.
        ranker: Ranker for the frame selector `query`.

    Raises:
        UserError: An episode ended without an answer, because of the video or the policy.
    """
    jobs = [TeacherJob(task, 0) for task in tasks]
    trajectories = await run_scripted_jobs(jobs, frames, chat_format, config, make_policy, ranker)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        if trajectory.status is not EpisodeStatus.ANSWERED:
            reason = trajectory.error or str(trajectory.status)
            raise UserError(f"exemplar of task {task.task_id} on {task.video}: {reason}")
    return trajectories


async def run_scripted_jobs(
    jobs: Sequence[TeacherJob],
    frames: FrameSource,
    chat_format: ChatFormat,
    config: EpisodeConfig,
    make_policy: Callable[[Task], Policy],
    ranker: FrameRanker | None = None,
) -> list[Trajectory]:
    """Run the jobs with a scripted policy in place of the teacher; return the trajectories in order.

    Raises:
        FramesChangedError: A video yields other frames than in the prefix of a job.
    """
    slots = asyncio.Semaphore(MAX_CONCURRENT_EPISODES)

    async def run_job(job: TeacherJob) -> Trajectory:
        async with slots:
            return await run_episode(
                job.task,
                PrefixReplay(job, make_policy(job.task)),
                frames,
                chat_format,
                config,
                episode_id=job.episode_id,
                sampling_params=SamplingParams(),
                ranker=ranker,
            )

    return list(await asyncio.gather(*map(run_job, jobs)))


def zoom_oracle_factory(
    chat_format: ChatFormat, sparse_zoom_share: float = 0.0, seed: int = 0
) -> Callable[[Task], Policy]:
    """Return a factory of `ZoomOracle`. See there for `sparse_zoom_share`."""
    return lambda task: ZoomOracle(task, chat_format, SLOTS_PER_SHOT, sparse_zoom_share=sparse_zoom_share, seed=seed)


def uniform_oracle_factory(chat_format: ChatFormat) -> Callable[[Task], Policy]:
    """Return a factory of `UniformOracle`."""
    return lambda task: UniformOracle(task, chat_format)
