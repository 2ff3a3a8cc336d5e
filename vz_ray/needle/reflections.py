"""Reflections: wrong episodes of the policy, corrected by the oracle, for the cold start.

This reproduces the paper's reflection data in one process. `distill.reflection` selects the episodes and
their prefix turns, the oracle replaces the teacher, and `distill.filters` selects the results. Prefix turns
have no loss.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.data.sft_file import fold_turns_into_prompt
from vz_ray.distill.filters import count_prefix_turns
from vz_ray.distill.teacher_runner import PREFIX_TURNS, FramesChangedError, PrefixReplay, TeacherJob
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import FrameRanker, FrameSource, Policy
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, SamplingParams, Trajectory
from vz_ray.needle.exemplars import MAX_CONCURRENT_EPISODES
from vz_ray.needle.needle_video import SLOTS_PER_SHOT
from vz_ray.needle.oracle import CorrectionOracle
from vz_ray.rewards import score_episode
from vz_ray.utils.errors import UserError

REFLECTION_STAGE = "reflection"


def correction_oracle_factory(chat_format: ChatFormat) -> Callable[[Task], Policy]:
    """Return a factory of `CorrectionOracle`."""
    return lambda task: CorrectionOracle(task, chat_format, SLOTS_PER_SHOT)


async def collect_reflections(
    jobs: Sequence[TeacherJob],
    frames: FrameSource,
    chat_format: ChatFormat,
    config: EpisodeConfig,
    reward: RewardConfig,
    make_policy: Callable[[Task], Policy],
    ranker: FrameRanker | None = None,
) -> list[EpisodeRecord]:
    """Continue and score each job; return all records in order, including wrong ones.

    Raises:
        UserError: A video yields other frames than in the recorded episode.
    """
    slots = asyncio.Semaphore(MAX_CONCURRENT_EPISODES)

    async def run_job(job: TeacherJob) -> EpisodeRecord:
        try:
            async with slots:
                trajectory = await run_episode(
                    job.task,
                    PrefixReplay(job, make_policy(job.task)),
                    frames,
                    chat_format,
                    config,
                    episode_id=EpisodeId(0, job.task.task_id, job.sample),
                    sampling_params=SamplingParams(),
                    ranker=ranker,
                )
        except FramesChangedError as error:
            raise UserError(f"{error}. Delete the episodes of this video and sample them again.") from error
        trajectory = replace(
            trajectory,
            reward=score_episode(trajectory, job.task, reward),
            extra={PREFIX_TURNS: len(job.prefix_turns)},
        )
        return EpisodeRecord(job.task, trajectory, REFLECTION_STAGE)

    return list(await asyncio.gather(*(run_job(job) for job in jobs)))


def sample_reflections(records: Sequence[EpisodeRecord], max_reflections: int, seed: int) -> list[EpisodeRecord]:
    """Sample at most `max_reflections` records at random, in their original order."""
    if len(records) <= max_reflections:
        return list(records)
    chosen = sorted(random.Random(f"reflections/{seed}").sample(range(len(records)), max_reflections))
    return [records[index] for index in chosen]


def to_training_trajectory(record: EpisodeRecord) -> Trajectory:
    """Fold the prefix turns into the prompt, so that only the corrected turns have a loss."""
    return fold_turns_into_prompt(record.trajectory, count_prefix_turns(record))
