"""The policy's own wrong zooms, corrected by someone who knows: for the cold start, beside exemplars.

The paper's reflection data in one process: `distill/reflect` says which episodes
and which of their turns are gone on from, an oracle of the needle world takes the
expert's place, and the rules of `distill/select` say what is kept. The policy's
own turns are read and not learned from.
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


def correction_oracle_factory(wire: ChatFormat) -> Callable[[Task], Policy]:
    """Experts that say what a zoom missed, zoom again and answer."""
    return lambda task: CorrectionOracle(task, wire, SLOTS_PER_SHOT)


async def collect_reflections(
    jobs: Sequence[TeacherJob],
    frames: FrameSource,
    wire: ChatFormat,
    config: EpisodeConfig,
    reward: RewardConfig,
    make_policy: Callable[[Task], Policy],
    ranker: FrameRanker | None = None,
) -> list[EpisodeRecord]:
    """Each job gone on with by its expert and scored, in order; wrong ones too.

    Raises:
        UserError: A video shows other frames than when the policy played.
    """
    room = asyncio.Semaphore(MAX_CONCURRENT_EPISODES)

    async def one(job: TeacherJob) -> EpisodeRecord:
        policy, id = PrefixReplay(job, make_policy(job.task)), EpisodeId(0, job.task.task_id, job.sample)
        try:
            async with room:
                played = await run_episode(
                    job.task,
                    policy,
                    frames,
                    wire,
                    config,
                    episode_id=id,
                    sampling_params=SamplingParams(),
                    ranker=ranker,
                )
        except FramesChangedError as error:
            raise UserError(
                f"{error}: delete the episodes that were played on it, and play them again"
            ) from error
        parts = score_episode(played, job.task, reward)
        return EpisodeRecord(
            job.task,
            replace(played, reward=parts, extra={PREFIX_TURNS: len(job.prefix_turns)}),
            REFLECTION_STAGE,
        )

    return list(await asyncio.gather(*(one(job) for job in jobs)))


def sample_reflections(
    records: Sequence[EpisodeRecord], max_reflections: int, seed: int
) -> list[EpisodeRecord]:
    """At most `max_reflections` of them, drawn without looking, in their order."""
    if len(records) <= max_reflections:
        return list(records)
    chosen = sorted(random.Random(f"reflections/{seed}").sample(range(len(records)), max_reflections))
    return [records[index] for index in chosen]


def to_training_trajectory(record: EpisodeRecord) -> Trajectory:
    """What is learned from a reflection: the expert's turns alone; those before them are its prompt."""
    return fold_turns_into_prompt(record.trajectory, count_prefix_turns(record))
