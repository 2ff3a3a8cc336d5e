"""GRPO training loop; one step is the algorithm box of the paper.

    collect a batch: roll out groups, score, drop groups of equal rewards   scheduler
    learner step: advantages, loss, updates                                 learner
    publish the new weights to every engine and verify them                 scheduler
    log metrics; validate and write a checkpoint on schedule

With `train.colocate`, engines and learner alternate on the same GPUs; see `gpu_handover.py`.
A stop request is honoured in every phase; what survives is the last completed step. A learner step is dropped
before its next micro-batch, a publish and a validation are left out.

With `train.max_staleness: 0` rollout and learning alternate, and every token comes from the weights that
train on it. With k > 0, rollout continues during the learner step, and a token is at most k updates old.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.episode_record import append_records
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import Task
from vz_ray.env.trajectory import SamplingParams
from vz_ray.eval.eval_log import EvalLog
from vz_ray.eval.eval_metrics import step_metrics
from vz_ray.eval.runner import evaluate
from vz_ray.learner.advantages import is_trainable
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.log_context import set_log_context
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rollout.batch_collector import RolloutBatch, collect_batch
from vz_ray.rollout.batch_prefetcher import BatchPrefetcher
from vz_ray.rollout.rollout_metrics import RolloutMetrics
from vz_ray.rollout.teacher_scorer import teacher_metrics
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.runtime.runtime import Runtime
from vz_ray.training.gpu_handover import GpuHandover
from vz_ray.training.state import LEARNER_DIR, TrainingState, delete_outputs_from, latest_checkpoint
from vz_ray.training.step_metrics import (
    batch_metrics,
    check_batch,
    check_mismatch,
    check_teacher,
    episode_records,
    staleness_metrics,
)
from vz_ray.utils.interrupt import Interrupt, StepStopped, StopRequested, describe_saved
from vz_ray.weight_sync import PublishReport

log = logging.getLogger(__name__)

PROGRESS_METRICS = (
    metric_names.REWARD_TOTAL,
    metric_names.REWARD_ACCURACY,
    metric_names.ZOOM_VALID_RATE,
    metric_names.MISMATCH_KL,
    metric_names.WEIGHT_SYNC_SECONDS,
)
"""Metrics of the progress display."""


async def train(
    config: GrpoRunConfig,
    run_dir: RunDir,
    runtime: Runtime,
    handover: GpuHandover,
    progress: Progress,
    interrupt: Interrupt,
) -> TrainingState:
    """Train until `train.max_steps`; resume from the newest checkpoint, if any.

    Raises:
        StopRequested: A stop was requested; the checkpoint contains every completed step, and the message names it.
        LearnerDiedError: A rank of the learner died. The caller may restart the learner and call again.
        UserError: No episode of a step can be used, or engine and learner disagree by more than
            `train.max_mismatch_kl`.
    """
    state = await interrupt.run_interruptible(initialize_state(config, run_dir, runtime))
    max_steps, monitor = config.train.max_steps, runtime.monitor
    monitor.on_start(state.step, max_steps, config.train.max_mismatch_kl)
    rollout_metrics = RolloutMetrics()
    prefetcher = BatchPrefetcher(
        lambda step: collect_step_batch(config, state, runtime, step), config.train.max_staleness, max_steps
    )
    async with prefetcher, _checkpoint_on_stop(config, state, run_dir, runtime, prefetcher):
        with (
            _open_metrics(run_dir, state, monitor) as metric_logger,
            progress.stage("rl", max_steps, state.step) as stage,
        ):
            while state.step < max_steps:
                set_log_context(step=state.step)
                timer = _PhaseTimer(monitor)
                with timer.phase("rollout"):
                    batch = await next_batch(state, runtime, prefetcher, interrupt)
                    check_batch(batch, rewards_needed=not config.teacher.distills_only)
                    check_teacher(batch, runtime)
                if config.train.colocate:
                    with timer.phase("sleep"):
                        await interrupt.run_interruptible(handover.give_to_learner(runtime.learner))
                with timer.phase("learn"):
                    learner_metrics = await learner_step(state, runtime, batch, interrupt)
                    staleness = staleness_metrics(batch, state, config)
                with timer.phase("publish"):
                    publish_report = await publish_weights(config, state, runtime, interrupt)

                row = {
                    **await record_episodes(config, state, run_dir, runtime, batch, rollout_metrics, timer),
                    **batch_metrics(batch, learner_metrics, publish_report),
                    **handover.metrics(publish_report),
                    **staleness,
                    **timer.seconds,
                }
                metric_logger.log(state.step, row)
                monitor.on_rl_step(state.step, row, len(batch.sampled), len(batch.kept))
                progress.show_metrics({name: row[name] for name in PROGRESS_METRICS if name in row})
                check_mismatch(row, config)

                state.finish_step(batch.informative)
                stage.advance()
                await validate_and_checkpoint(config, state, run_dir, runtime, metric_logger, row, interrupt)
                monitor.on_step_end(state.step - 1)
    return state


def _open_metrics(run_dir: RunDir, state: TrainingState, monitor: RunMonitor) -> MetricLogger:
    """Return the logger of metrics; rows after the resumed step are deleted."""
    folder = run_dir.path / "tensorboard"
    return MetricLogger(run_dir.metrics, folder, resume_step=state.step - 1, trackers=monitor.trackers)


async def record_episodes(
    config: GrpoRunConfig,
    state: TrainingState,
    run_dir: RunDir,
    runtime: Runtime,
    batch: RolloutBatch,
    rollout_metrics: RolloutMetrics,
    timer: _PhaseTimer,
) -> dict[str, float]:
    """Append the step's episodes to their log and return the metrics of the rollout."""
    records = episode_records(batch, state.step, config)
    append_records(run_dir.episodes / f"{state.step:06d}.jsonl", records)
    worker_stats = await runtime.scheduler.pool.worker_stats()
    return {
        **step_metrics(records),
        **teacher_metrics(batch),
        **rollout_metrics.compute(worker_stats, sum(timer.seconds.values())),
        "data/epoch": state.task_sampler.epoch,
        metric_names.SKIP_RATE: state.task_sampler.skip_rate,
    }


async def initialize_state(config: GrpoRunConfig, run_dir: RunDir, runtime: Runtime) -> TrainingState:
    """Return the initial or resumed state, and publish its weights to the engines."""
    tasks = read_tasks(config.data.train)
    check_videos(tasks, config.data.train)
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        state = TrainingState(TaskSampler(tasks, config.seed, config.train.max_skip_rate))
    else:
        state = TrainingState.load(checkpoint, tasks, config.train.max_skip_rate)
        await runtime.learner.load_checkpoint(checkpoint / LEARNER_DIR)
    delete_outputs_from(run_dir, state.step)
    # The engines may hold the model of another stage under a higher version.
    state.weight_version = max(state.weight_version, runtime.scheduler.pool.version) + 1
    await runtime.scheduler.pool.publish(state.weight_version, runtime.transport)
    return state


async def collect_step_batch(config: GrpoRunConfig, state: TrainingState, runtime: Runtime, step: int) -> RolloutBatch:
    """Roll out the batch of one step."""
    train_config = config.train
    return await collect_batch(
        runtime.scheduler,
        state.tasks_for_step(step),
        state.sample_tracker,
        step=step,
        batch_size=train_config.batch_size,
        max_sampled_tasks=train_config.max_sampled_tasks,
        group_size=train_config.group_size,
        extra_samples=train_config.extra_samples,
        sampling=SamplingParams(train_config.temperature, 1.0, config.episode.max_turn_tokens, config.seed),
        keep=lambda group: is_trainable(group, config.learner.loss),
        score=None if runtime.teacher is None else runtime.teacher.score_group,
        episode_config=lambda task: draw_episode_config(config, step, task),
    )


def draw_episode_config(config: GrpoRunConfig, step: int, task: Task) -> EpisodeConfig | None:
    """Return the config of a group's episodes, with the overview's frames drawn from `train.min_overview_frames` to
    `episode.overview_frames`. It depends only on seed, step and task.

    Returns:
        None if the workers' config is used.
    """
    if not config.train.min_overview_frames:
        return None
    rng = random.Random(f"{config.seed}/{step}/{task.task_id}")
    frames = rng.randint(config.train.min_overview_frames, config.episode.overview_frames)
    return replace(config.episode, overview_frames=frames)


async def next_batch(
    state: TrainingState, runtime: Runtime, prefetcher: BatchPrefetcher, interrupt: Interrupt
) -> RolloutBatch:
    """Return the batch of the current step.

    Raises:
        StopRequested: A stop was requested.
        LearnerDiedError: A rank of the learner died while the batch was rolled out.
    """
    interrupt.raise_if_requested()
    return await interrupt.run_interruptible(runtime.learner.run_with_health_check(prefetcher.get_batch(state.step)))


async def learner_step(
    state: TrainingState, runtime: Runtime, batch: RolloutBatch, interrupt: Interrupt
) -> dict[str, float]:
    """Update the weights and return the learner's metrics.

    Raises:
        StopRequested: A stop was requested before the last micro-batch; the weights are those before the step.
        LearnerDiedError: A rank of the learner died.
    """
    with runtime.scheduler.pool.keep_workers():
        step = asyncio.ensure_future(runtime.learner.grpo_step(batch.kept, state.weight_version))
        stop = asyncio.ensure_future(interrupt.wait_requested())
        try:
            await asyncio.wait({step, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                try:
                    await runtime.learner.request_stop()
                except Exception as error:  # of the rank's node; the step then ends normally, or with its own error
                    log.warning("The learner step cannot be dropped and is completed: %s", error)
            return await step
        except StepStopped:
            interrupt.raise_if_requested()
            raise
        finally:
            for task in (step, stop):
                task.cancel()
            await asyncio.gather(step, stop, return_exceptions=True)


async def publish_weights(
    config: GrpoRunConfig, state: TrainingState, runtime: Runtime, interrupt: Interrupt
) -> PublishReport | None:
    """Publish the new weights to the engines. A stop request ends the publish: the checkpoint has the weights.

    Returns:
        None if a stop was requested.
    """
    state.weight_version += 1
    pool, options = runtime.scheduler.pool, config.train
    with pool.keep_workers():
        publish = pool.publish(state.weight_version, runtime.transport, wait_for_episodes=options.wait_for_episodes)
        try:
            return await interrupt.run_interruptible(publish)
        except StopRequested:
            return None


@asynccontextmanager
async def _checkpoint_on_stop(
    config: GrpoRunConfig, state: TrainingState, run_dir: RunDir, runtime: Runtime, prefetcher: BatchPrefetcher
) -> AsyncIterator[None]:
    """Save the last completed step if a stop request ends the block."""
    try:
        yield
    except StopRequested as stop:
        await prefetcher.cancel()
        if state.step:
            await save_checkpoint(state, config, run_dir, runtime)
        raise StopRequested(f"{stop}; {describe_saved(state.step)}", stop.resume_hint) from None


async def validate(config: GrpoRunConfig, state: TrainingState, run_dir: RunDir, runtime: Runtime) -> dict[str, float]:
    """Evaluate the weights of the last completed step on the validation tasks and return the metrics."""
    runtime.monitor.on_phase("evaluate")
    tasks = read_tasks(config.data.validation)
    log_path = run_dir.path / "validation" / f"{state.step:06d}.jsonl"
    eval_log = EvalLog(log_path, {"step": state.step, "tasks": config.data.validation})
    results = await runtime.learner.run_with_health_check(
        evaluate(runtime.scheduler, tasks, eval_log, config.episode, stage="validation", step=state.step)
    )
    return {f"validation/{name}": value for name, value in step_metrics(results).items()}


async def validate_and_checkpoint(
    config: GrpoRunConfig,
    state: TrainingState,
    run_dir: RunDir,
    runtime: Runtime,
    metric_logger: MetricLogger,
    row: Mapping[str, float],
    interrupt: Interrupt,
) -> None:
    """Validate and write a checkpoint if the completed step is due; the last step always is checkpointed.

    Raises:
        StopRequested: A stop was requested during the validation, which is not repeated.
    """
    step, validate_every = state.step, config.train.validate_every
    validation_metrics: dict[str, float] = {}
    if validate_every and step % validate_every == 0:
        validation_metrics = await interrupt.run_interruptible(validate(config, state, run_dir, runtime))
        metric_logger.log(step - 1, validation_metrics)
    due = step % config.train.checkpoint_every == 0 or step == config.train.max_steps
    if due or (config.train.keep_best and validation_metrics):
        metric = checkpoint_metric(validation_metrics if validate_every else row, validate_every)
        await save_checkpoint(state, config, run_dir, runtime, metric)


def checkpoint_metric(row: Mapping[str, float], validate_every: int) -> tuple[str, float] | None:
    """Return name and value of the metric that ranks checkpoints for `train.keep_best`, if `row` has it."""
    name = f"validation/{metric_names.REWARD_ACCURACY}" if validate_every else metric_names.REWARD_TOTAL
    return (name, row[name]) if name in row else None


async def save_checkpoint(
    state: TrainingState,
    config: GrpoRunConfig,
    run_dir: RunDir,
    runtime: Runtime,
    metric: tuple[str, float] | None = None,
) -> None:
    runtime.monitor.on_phase("checkpoint")
    await state.save(
        run_dir,
        runtime.learner.save_checkpoint,
        config.train.keep_checkpoints,
        config.train.keep_best,
        metric,
    )
    runtime.monitor.on_checkpoint(state.step)


class _PhaseTimer:
    """Seconds of each phase of a step, by metric name."""

    def __init__(self, monitor: RunMonitor) -> None:
        self.seconds: dict[str, float] = {}
        self._monitor = monitor

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report the phase to the monitor and record its time."""
        self._monitor.on_phase(name)
        started_at = time.monotonic()
        yield
        self.seconds[f"{metric_names.TIME_PREFIX}{name}_seconds"] = time.monotonic() - started_at
