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

from vz_ray.coldstart.distill.select import given_turns
from vz_ray.coldstart.distill.studio import GIVEN, Job, OtherFrames, TakingOver
from vz_ray.coldstart.exemplars import AT_ONCE
from vz_ray.coldstart.oracle import Corrector
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.needle.world import SLOTS
from vz_ray.data.record import EpisodeRecord
from vz_ray.data.sft_file import folded
from vz_ray.data.task import Task
from vz_ray.episode.protocols import FrameSource, Policy, Ranker
from vz_ray.episode.runner import play
from vz_ray.episode.trajectory import EpisodeId, Sampling, Trajectory
from vz_ray.episode.wire import WireFormat
from vz_ray.observe.errors import UserError
from vz_ray.reward import score

STAGE = "reflection"


def correcting(wire: WireFormat) -> Callable[[Task], Policy]:
    """Experts that say what a zoom missed, zoom again and answer."""
    return lambda task: Corrector(task, wire, SLOTS)


async def play_reflections(
    jobs: Sequence[Job],
    frames: FrameSource,
    wire: WireFormat,
    config: EpisodeConfig,
    reward: RewardConfig,
    expert: Callable[[Task], Policy],
    ranker: Ranker | None = None,
) -> list[EpisodeRecord]:
    """Each job gone on with by its expert and scored, in order; wrong ones too.

    Raises:
        UserError: A video shows other frames than when the policy played.
    """
    room = asyncio.Semaphore(AT_ONCE)

    async def one(job: Job) -> EpisodeRecord:
        policy, id = TakingOver(job, expert(job.task)), EpisodeId(0, job.task.task_id, job.sample)
        try:
            async with room:
                played = await play(
                    job.task, policy, frames, wire, config, id=id, sampling=Sampling(), ranker=ranker
                )
        except OtherFrames as error:
            raise UserError(
                f"{error}: delete the episodes that were played on it, and play them again"
            ) from error
        parts = score(played, job.task, reward)
        return EpisodeRecord(job.task, replace(played, reward=parts, extra={GIVEN: len(job.given)}), STAGE)

    return list(await asyncio.gather(*(one(job) for job in jobs)))


def drawn(records: Sequence[EpisodeRecord], most: int, seed: int) -> list[EpisodeRecord]:
    """At most `most` of them, drawn without looking, in their order."""
    if len(records) <= most:
        return list(records)
    chosen = sorted(random.Random(f"reflections/{seed}").sample(range(len(records)), most))
    return [records[index] for index in chosen]


def learned_of(record: EpisodeRecord) -> Trajectory:
    """What is learned from a reflection: the expert's turns alone; those before them are its prompt."""
    return folded(record.trajectory, given_turns(record))
