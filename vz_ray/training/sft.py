"""SFT with Ray (`vz-ray sft`), and the SFT stage that every supervised run consists of.

`learner/sft.py` has the loop. `learner/torchrun.py` runs the same loop without Ray.
"""

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
from vz_ray.learner.sft import SftState, sft_loop
from vz_ray.monitoring.live_status import RunKind
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.planning.sequence_parallel import check_checkpoint_heads
from vz_ray.runtime import runtime
from vz_ray.runtime.monitor_run import monitor_run
from vz_ray.runtime.ray_cluster import checked_ray_cluster
from vz_ray.runtime.run_context import POLICY_STAGE, RunContext, open_run, report_finished
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.training.restarts import run_with_restarts
from vz_ray.utils.errors import UserError


def run_sft(config: SftRunConfig) -> None:
    """Train `config.model` on the trajectories of `config.data` and export it; resume an interrupted run.

    Raises:
        UserError: The data is missing or invalid, has other prompts than the config, or is too long.
        StopRequested: A stop was requested; the checkpoint is complete.
    """
    if not config.data:
        raise UserError("data is empty; set it to episode logs, or to samples with messages and images")
    check_checkpoint_heads(config.model, config.learner)
    with open_run(config) as run:
        if report_finished(run):
            return
        asyncio.run(_run_sft(config, run, read_sft_data(config)))
        run.progress.print_line(f"exported the policy to {run.model_dir(POLICY_STAGE)}")


async def _run_sft(config: SftRunConfig, run: RunContext, source: SftFile | list[Trajectory]) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(checked_ray_cluster(config))
        decode_pool = await stack.enter_async_context(runtime.decode_pool(config))
        monitor = await stack.enter_async_context(
            monitor_run(
                config.monitoring,
                run.run_dir,
                decode_pool,
                run_kind=RunKind.SFT,
                metrics_file=metrics_file(POLICY_STAGE),
            )
        )
        trajectories = source
        if isinstance(trajectories, SftFile):
            trajectories = await _read_samples(trajectories, config, run, decode_pool)
        epochs = config.sft.max_steps * config.sft.batch_size / len(trajectories)
        run.progress.print_line(f"{len(trajectories)} trajectories, at most {epochs:.3g} epochs")
        await run_sft_stage(
            config.learner,
            config.ray,
            run,
            decode_pool,
            POLICY_STAGE,
            trajectories,
            config.sft,
            config.seed,
            monitor=monitor,
        )


async def _read_samples(
    source: SftFile, config: SftRunConfig, run: RunContext, decode_pool: DecodePool
) -> list[Trajectory]:
    """Read the images of samples and tokenize them."""
    with run.progress.stage("read images", len(source.records)) as stage:
        return await run.interrupt.run_interruptible(read_samples(source, config, decode_pool, stage.advance))


async def run_sft_stage(
    learner_config: LearnerConfig,
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
    """Train `learner_config.model` on `trajectories` and export it as the model of `stage`.

    Metrics are in `<stage>.jsonl` and `tensorboard/<stage>` of the run directory. The learner restarts after
    failures, up to `learner.max_restarts` consecutive ones.

    Args:
        monitor: Monitor of the run, if this is its only stage.

    Raises:
        StopRequested: A stop was requested; the checkpoint is complete.
    """
    monitor = monitor or RunMonitor()
    learner_config = _stage_learner_config(learner_config, sft_config, run)
    directory, checkpoints = run.run_dir.path, run.run_dir.checkpoints / stage
    metrics, tensorboard = directory / metrics_file(stage), directory / "tensorboard" / stage
    placement = runtime.learner_placement(learner_config, ray_config)
    async with runtime.start_learner(learner_config, decode_pool, run, placement) as learner:

        async def train_and_export() -> SftState:
            resume_step = SftState.load(checkpoints).steps
            max_steps = None if sft_config.max_time_s else sft_config.max_steps
            with (
                MetricLogger(metrics, tensorboard, resume_step, monitor.trackers) as metric_logger,
                run.progress.stage(stage, max_steps, resume_step) as progress,
            ):
                state = await sft_loop(
                    learner,
                    trajectories,
                    sft_config,
                    seed=seed,
                    checkpoints=checkpoints,
                    metric_logger=metric_logger,
                    stage=progress,
                    interrupt=run.interrupt,
                    monitor=monitor,
                )
            run.interrupt.raise_if_requested()
            monitor.on_phase("export")
            await learner.export_hf(run.model_dir(stage))
            return state

        return await run_with_restarts(
            learner,
            train_and_export,
            max_restarts=learner_config.max_restarts,
            metrics=metrics,
            interrupt=run.interrupt,
        )


def _stage_learner_config(learner_config: LearnerConfig, sft_config: SftConfig, run: RunContext) -> LearnerConfig:
    """Return the learner's config with the learning rate schedule of the SFT stage."""
    optimizer = replace(learner_config.optimizer, lr_schedule=sft_config.lr_schedule, total_steps=sft_config.max_steps)
    return replace(learner_config, optimizer=optimizer, replay_dir=run.replay_dir(learner_config))


def metrics_file(stage: str) -> str:
    """Return the file name of an SFT stage's metrics."""
    return f"{stage}.jsonl"
