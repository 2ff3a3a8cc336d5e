"""`vz-ray sft`: a checkpoint taught by trajectories, and the stage that every supervised run is made of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from vz_ray import actors
from vz_ray.clips import ClipPool
from vz_ray.coldstart.sft import SftState, supervise
from vz_ray.config.coldstart import SftConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import RayConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.sft_file import SftFile
from vz_ray.data.sft_source import read_samples, read_source
from vz_ray.desk import Desk, desk
from vz_ray.episode.trajectory import Trajectory
from vz_ray.observe.errors import UserError
from vz_ray.observe.live import STEP
from vz_ray.observe.metrics import MetricLog
from vz_ray.restarts import restarting
from vz_ray.watch.watch import Watch
from vz_ray.watch.watching import watching

POLICY = "policy"


def run_sft(config: SftRunConfig) -> None:
    """Trains `config.model` on the trajectories of `config.data`, and exports it; resumable.

    Raises:
        UserError: The file is missing or of neither layout, or its trajectories are of another wording, or
            too long.
    """
    if not config.data:
        raise UserError(
            "nothing to learn from: set data to a file of episodes, or of samples with messages and images"
        )
    with desk(config) as at:
        asyncio.run(_run(config, at, read_source(config)))


async def _run(config: SftRunConfig, at: Desk, source: SftFile | list[Trajectory]) -> None:
    if not at.model(POLICY).exists():
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(actors.cluster_of(config))
            frames = await stack.enter_async_context(actors.clip_pool(config))
            watch = await stack.enter_async_context(
                watching(config.observe, at.run, frames, unit=STEP, rows=rows_of(POLICY))
            )
            trajectories = source if isinstance(source, list) else await _read(source, config, at, frames)
            epochs = config.sft.steps * config.sft.batch / len(trajectories)
            at.progress.say(f"{len(trajectories)} trajectories, at most {epochs:.3g} times each")
            learner = replace(config.learner, model=config.model)
            taught = trajectories, config.sft, config.seed
            await teach(learner, config.ray, at, frames, POLICY, *taught, watch=watch)
    at.progress.say(f"the policy is in {at.model(POLICY)}")


async def _read(source: SftFile, config: SftRunConfig, at: Desk, frames: ClipPool) -> list[Trajectory]:
    """The trajectories of a file of samples, in the model's own tokens."""
    with at.progress.stage("read images", len(source.records)) as bar:
        return await at.interrupt.watch(read_samples(source, config, frames, bar.advance))


async def teach(
    learner: LearnerConfig,
    ray: RayConfig,
    at: Desk,
    frames: ClipPool,
    stage: str,
    trajectories: Sequence[Trajectory],
    length: SftConfig,
    seed: int,
    *,
    watch: Watch | None = None,
) -> SftState:
    """Trains `learner.model` on written turns, and exports it as the model of `stage`.

    Figures of its steps are in `<stage>.jsonl` and below `tensorboard/<stage>`.

    Args:
        watch: Of the whole run, where it has no other stage.
    """
    watch = watch or Watch()
    rate = replace(learner.optimizer, schedule=length.schedule, total_steps=length.steps)
    settings = replace(learner, optimizer=rate, replay=at.replay(learner))
    checkpoints = at.run.checkpoints / stage
    metrics = at.run.path / rows_of(stage)
    events = at.run.path / "tensorboard" / stage
    async with actors.learner(settings, ray, frames, at) as group:

        async def attempt() -> SftState:
            with (
                MetricLog(metrics, events, SftState.load(checkpoints).steps, watch.trackers) as log,
                at.progress.stage(stage, None if length.max_seconds else length.steps) as bar,
            ):
                state = await supervise(
                    group,
                    trajectories,
                    length,
                    seed=seed,
                    checkpoints=checkpoints,
                    log=log,
                    stage=bar,
                    interrupt=at.interrupt,
                    watch=watch,
                )
            watch.doing("export")
            await group.export_hf(at.model(stage))
            return state

        return await restarting(
            group, attempt, most=settings.restarts, metrics=metrics, interrupt=at.interrupt
        )


def rows_of(stage: str) -> str:
    """Name of the file of a supervised stage's metrics."""
    return f"{stage}.jsonl"
