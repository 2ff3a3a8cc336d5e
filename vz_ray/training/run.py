"""RL training run (`vz-ray train`), top to bottom.

    check data -> open run directory -> Ray cluster -> decode pool -> rollout workers (vLLM)
    -> learner (DeepSpeed) -> weight transport -> monitor -> teacher (vLLM, optional) -> training loop -> export

`training/loop.py` holds the algorithm. Every resource is closed in reverse order on exit.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.decode import DecodePool
from vz_ray.families import load_model_shape
from vz_ray.learner.placement import LearnerPlacement
from vz_ray.learner.weight_transports import create_weight_transport
from vz_ray.planning.published_weights import check_published_adapters
from vz_ray.planning.sequence_parallel import check_checkpoint_heads
from vz_ray.rewards import check_choices, check_scorers
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.runtime import runtime
from vz_ray.runtime.monitor_run import monitor_run
from vz_ray.runtime.ray_cluster import checked_ray_cluster
from vz_ray.runtime.run_context import POLICY_STAGE, RunContext, open_run, report_finished
from vz_ray.runtime.runtime import Runtime
from vz_ray.training.gpu_handover import GpuHandover
from vz_ray.training.loop import train
from vz_ray.training.restarts import run_with_restarts


def run_training(config: GrpoRunConfig) -> None:
    """Train `config.model` with GRPO and export the policy to `models/policy` of the run directory.

    An interrupted run resumes from its newest checkpoint.

    Raises:
        UserError: The config, the data, this machine or the cluster fails a check, or training cannot continue.
        StopRequested: A stop was requested; the checkpoint is complete.
    """
    check_checkpoint_heads(config.model, config.learner)
    task_files = [config.data.train, *([config.data.validation] if config.train.validate_every else [])]
    for path in task_files:
        tasks = read_tasks(path)
        check_videos(tasks, path)
        check_scorers(config.reward, tasks, path)
        check_choices(tasks, path)
    if config.publishes_adapters:
        check_published_adapters(load_model_shape(config.model), config.learner.lora)
    with open_run(config) as run:
        if report_finished(run):
            return
        asyncio.run(_run_training(config, run))
        run.progress.print_line(f"exported the policy to {run.model_dir(POLICY_STAGE)}")


async def _run_training(config: GrpoRunConfig, run: RunContext) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(checked_ray_cluster(config))
        decode_pool = await stack.enter_async_context(runtime.decode_pool(config))
        # Before the engines, so that they do not take single GPUs of the learner's node.
        placement = runtime.rl_placement(config)
        stack.callback(placement.release)
        await run.interrupt.run_interruptible(placement.reserve())
        scheduler = await start_rollout(config, run, decode_pool, stack, placement)
        await run_rl_stage(config, run, config.model, decode_pool, scheduler, POLICY_STAGE, placement)


async def start_rollout(
    config: GrpoRunConfig,
    run: RunContext,
    decode_pool: DecodePool,
    stack: AsyncExitStack,
    placement: LearnerPlacement | None = None,
) -> RolloutScheduler:
    """Start the rollout workers in `stack`; a stop request interrupts the start."""
    return await run.interrupt.run_interruptible(
        stack.enter_async_context(runtime.start_rollout(config, config.model, decode_pool, run.run_dir, placement))
    )


async def run_rl_stage(
    config: GrpoRunConfig,
    run: RunContext,
    initial_model: Path | str,
    decode_pool: DecodePool,
    scheduler: RolloutScheduler,
    stage: str,
    placement: LearnerPlacement | None = None,
) -> Path:
    """Train `initial_model` with GRPO and export it as the model of `stage`, unless that model exists.

    The learner restarts after failures, up to `learner.max_restarts` consecutive ones. Without `placement`, it
    reserves its resources when it starts.

    Returns:
        Directory of the exported model.
    """
    model_dir = run.model_dir(stage)
    if model_dir.exists():
        return model_dir
    learner_config = replace(config.learner, model=str(initial_model), replay_dir=run.replay_dir(config.learner))
    placement = placement or runtime.rl_placement(config)
    handover = GpuHandover(config, scheduler.pool)
    with run.time_stage("rl"):
        async with AsyncExitStack() as stack:
            await run.interrupt.run_interruptible(handover.give_to_learner())
            learner = await stack.enter_async_context(
                runtime.start_learner(learner_config, decode_pool, run, placement)
            )
            store = await stack.enter_async_context(runtime.weight_store_dir(config))
            transport = create_weight_transport(
                learner,
                config.weights,
                store,
                config.rollout.engine.tensor_parallel_size,
                colocate=config.train.colocate,
            )
            monitor = await stack.enter_async_context(
                monitor_run(config.monitoring, run.run_dir, decode_pool, scheduler)
            )
            teacher = await run.interrupt.run_interruptible(
                stack.enter_async_context(runtime.start_teacher(config, initial_model, decode_pool, run.run_dir))
            )
            actors = Runtime(learner, scheduler, transport, monitor, teacher)

            async def train_and_export() -> None:
                await train(config, run.run_dir, actors, handover, run.progress, run.interrupt)
                await handover.give_to_learner(learner)
                await learner.export_hf(model_dir)

            await run_with_restarts(
                learner,
                train_and_export,
                before_restart=handover.give_to_learner,
                max_restarts=learner_config.max_restarts,
                metrics=run.run_dir.metrics,
                interrupt=run.interrupt,
            )
    return model_dir
