"""`vz-ray sft`: a checkpoint taught by trajectories, and the stage that every supervised run is made of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from vz_ray.config.learner import LearnerConfig
from vz_ray.config.ray import RayConfig
from vz_ray.config.sft import SftConfig, SftRunConfig
from vz_ray.data.sft_data import read_samples, read_sft_data
from vz_ray.data.sft_file import SftFile
from vz_ray.decode import DecodePool
from vz_ray.env.trajectory import Trajectory
from vz_ray.monitoring.live_status import RunKind
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.runtime import runtime
from vz_ray.runtime.monitor_run import monitor_run
from vz_ray.runtime.run_context import RunContext, open_run
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.training.restarts import run_with_restarts
from vz_ray.training.sft_loop import SftState, sft_loop
from vz_ray.utils.errors import UserError

POLICY_STAGE = "policy"


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
    with open_run(config) as at:
        asyncio.run(_run(config, at, read_sft_data(config)))


async def _run(config: SftRunConfig, at: RunContext, source: SftFile | list[Trajectory]) -> None:
    if not at.model_dir(POLICY_STAGE).exists():
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(runtime.checked_ray_cluster(config))
            frames = await stack.enter_async_context(runtime.decode_pool(config))
            watch = await stack.enter_async_context(
                monitor_run(
                    config.monitoring,
                    at.run_dir,
                    frames,
                    run_kind=RunKind.SFT,
                    metrics_file=metrics_file(POLICY_STAGE),
                )
            )
            trajectories = source if isinstance(source, list) else await _read(source, config, at, frames)
            epochs = config.sft.max_steps * config.sft.batch_size / len(trajectories)
            at.progress.print_line(f"{len(trajectories)} trajectories, at most {epochs:.3g} times each")
            learner = replace(config.learner, model=config.model)
            taught = trajectories, config.sft, config.seed
            await run_sft_stage(learner, config.ray, at, frames, POLICY_STAGE, *taught, monitor=watch)
    at.progress.print_line(f"the policy is in {at.model_dir(POLICY_STAGE)}")


async def _read(
    source: SftFile, config: SftRunConfig, at: RunContext, frames: DecodePool
) -> list[Trajectory]:
    """The trajectories of a file of samples, in the model's own tokens."""
    with at.progress.stage("read images", len(source.records)) as bar:
        return await at.interrupt.run_interruptible(read_samples(source, config, frames, bar.advance))


async def run_sft_stage(
    learner: LearnerConfig,
    ray_config: RayConfig,
    run: RunContext,
    decode_pool: DecodePool,
    stage: str,
    trajectories: Sequence[Trajectory],
    sft_config: SftConfig,
    seed: int,
    *,
    monitor: RunMonitor | None = None,
) -> SftState:
    """Trains `learner.model` on written turns, and exports it as the model of `stage`.

    Figures of its steps are in `<stage>.jsonl` and below `tensorboard/<stage>`.

    Args:
        monitor: Of the whole run, where it has no other stage.
    """
    monitor = monitor or RunMonitor()
    rate = replace(learner.optimizer, lr_schedule=sft_config.lr_schedule, total_steps=sft_config.max_steps)
    settings = replace(learner, optimizer=rate, replay_dir=run.replay_dir(learner))
    checkpoints = run.run_dir.checkpoints / stage
    metrics = run.run_dir.path / metrics_file(stage)
    events = run.run_dir.path / "tensorboard" / stage
    async with runtime.start_learner(settings, ray_config, decode_pool, run) as group:

        async def attempt() -> SftState:
            with (
                MetricLogger(metrics, events, SftState.load(checkpoints).steps, monitor.trackers) as log,
                run.progress.stage(stage, None if sft_config.max_time_s else sft_config.max_steps) as bar,
            ):
                state = await sft_loop(
                    group,
                    trajectories,
                    sft_config,
                    seed=seed,
                    checkpoints=checkpoints,
                    metric_logger=log,
                    stage=bar,
                    interrupt=run.interrupt,
                    monitor=monitor,
                )
            monitor.on_phase("export")
            await group.export_hf(run.model_dir(stage))
            return state

        return await run_with_restarts(
            group, attempt, max_restarts=settings.max_restarts, metrics=metrics, interrupt=run.interrupt
        )


def metrics_file(stage: str) -> str:
    """Name of the file of a supervised stage's metrics."""
    return f"{stage}.jsonl"
