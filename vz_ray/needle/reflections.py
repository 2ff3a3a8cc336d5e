"""Reflections: wrong episodes of the policy, corrected by the oracle, for the cold start.

This reproduces the paper's reflection data in one process. `distill.reflection` selects the episodes and
their prefix turns, the oracle replaces the teacher, and `distill.filters` selects the results. Prefix turns
have no loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.data.sft_file import fold_turns_into_prompt
from vz_ray.distill.filters import count_prefix_turns
from vz_ray.distill.teacher_runner import PREFIX_TURNS, FramesChangedError, TeacherJob
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import FrameRanker, FrameSource, Policy
from vz_ray.env.task import Task
from vz_ray.env.trajectory import Trajectory
from vz_ray.needle.exemplars import run_scripted_jobs
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
    try:
        trajectories = await run_scripted_jobs(jobs, frames, chat_format, config, make_policy, ranker)
    except FramesChangedError as error:
        raise UserError(f"{error}. Delete the episodes of this video and sample them again.") from error
    records = []
    for job, trajectory in zip(jobs, trajectories, strict=True):
        scored = replace(
            trajectory,
            reward=score_episode(trajectory, job.task, reward),
            extra={PREFIX_TURNS: len(job.prefix_turns)},
        )
        records.append(EpisodeRecord(job.task, scored, REFLECTION_STAGE))
    return records


def sample_reflections(records: Sequence[EpisodeRecord], max_reflections: int, seed: int) -> list[EpisodeRecord]:
    """Sample at most `max_reflections` records at random, in their original order."""
    if len(records) <= max_reflections:
        return list(records)
    chosen = sorted(random.Random(f"reflections/{seed}").sample(range(len(records)), max_reflections))
    return [records[index] for index in chosen]


def to_training_trajectory(record: EpisodeRecord) -> Trajectory:
    """Fold the prefix turns into the prompt, so that only the corrected turns have a loss."""
    return fold_turns_into_prompt(record.trajectory, count_prefix_turns(record))
