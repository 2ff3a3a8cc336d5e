"""GRPO training loop; one step is the algorithm box of the paper.

    collect a batch: roll out groups, score, drop groups of equal rewards   scheduler
    learner step: advantages, loss, updates                                 learner
    publish the new weights to every engine and verify them                 scheduler
    log metrics; validate and write a checkpoint on schedule

With `train.colocate`, engines and learner alternate on the same GPUs; see `gpu_handover.py`.
With `train.max_staleness: 0` rollout and learning alternate, and every token comes from the weights that
train on it. With k > 0, rollout continues during the learner step, and a token is at most k updates old.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.episode_record import EpisodeRecord, append_records
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeStatus, SamplingParams
from vz_ray.eval.eval_log import EvalLog
from vz_ray.eval.eval_metrics import step_metrics
from vz_ray.eval.runner import evaluate
from vz_ray.learner.advantages import is_trainable, outcome_advantages
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.log_context import set_log_context
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rollout.batch_collector import RolloutBatch, collect_batch
from vz_ray.rollout.batch_prefetcher import BatchPrefetcher, staleness_histogram
from vz_ray.rollout.rollout_metrics import RolloutMetrics
from vz_ray.rollout.teacher_scorer import teacher_metrics
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.runtime.runtime import Runtime
from vz_ray.training.gpu_handover import GpuHandover
from vz_ray.training.state import LEARNER_DIR, TrainingState, delete_outputs_from, latest_checkpoint
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt, StopRequested
from vz_ray.weight_sync import PublishReport

LEARNER_METRICS = {
    "loss": metric_names.LOSS,
    "entropy": metric_names.ENTROPY,
    "entropy_coef": metric_names.ENTROPY_COEF,
    "kl": metric_names.KL_TO_REFERENCE,
    "teacher_kl": metric_names.TEACHER_KL,
    "grad_norm": metric_names.GRAD_NORM,
    "skipped": metric_names.SKIPPED_UPDATES,
    "mismatch_abs_max": metric_names.MISMATCH_LOGPROB_MAX,
    "mismatch_kl": metric_names.MISMATCH_KL,
    "mismatch_abs_max_after_image": "mismatch/logprob_abs_max_after_image",
    "mismatch_kl_after_image": metric_names.MISMATCH_KL_IMAGE,
    "mismatch_abs_max_after_text": "mismatch/logprob_abs_max_after_text",
    "mismatch_kl_after_text": metric_names.MISMATCH_KL_TEXT,
    "mismatch_sequence_abs_mean": metric_names.MISMATCH_SEQUENCE_MEAN,
    "mismatch_sequence_abs_max": metric_names.MISMATCH_SEQUENCE_MAX,
    "mismatch_sequence_outlier_rate": metric_names.MISMATCH_SEQUENCE_OUTLIERS,
    "truncated_weight_rate": metric_names.TRUNCATED_WEIGHTS,
    "rejected_token_rate": metric_names.REJECTED_TOKENS,
    "rejected_trajectory_rate": metric_names.REJECTED_TRAJECTORIES,
    "mismatch_abs_max_stale": "staleness/logprob_abs_max",
    "mismatch_kl_stale": "staleness/kl",
}
"""Metric names of the learner's values; other values are logged as `learner/<name>`."""

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
        StopRequested: A stop was requested; the checkpoint contains every completed step.
        LearnerDiedError: A rank of the learner died. The caller may restart the learner and call again.
        UserError: No episode of a step can be used, or engine and learner disagree by more than
            `train.max_mismatch_kl`.
    """
    state = await initialize_state(config, run_dir, runtime)
    max_steps, monitor = config.train.max_steps, runtime.monitor
    monitor.on_start(state.step, max_steps, config.train.max_mismatch_kl)
    rollout_metrics = RolloutMetrics()
    prefetcher = BatchPrefetcher(
        lambda step: collect_step_batch(config, state, runtime, step), config.train.max_staleness, max_steps
    )
    async with prefetcher:
        with (
            _open_metrics(run_dir, state, monitor) as metric_logger,
            progress.stage("rl", max_steps, state.step) as stage,
        ):
            while state.step < max_steps:
                set_log_context(step=state.step)
                timer = _PhaseTimer(monitor)
                with timer.phase("rollout"):
                    batch = await next_batch(config, state, run_dir, runtime, prefetcher, interrupt)
                    check_batch(batch, rewards_needed=not config.teacher.distills_only)
                    check_teacher(batch, runtime)
                if config.train.colocate:
                    with timer.phase("sleep"):
                        await handover.give_to_learner(runtime.learner)
                with timer.phase("learn"):
                    learner_metrics = await runtime.learner.grpo_step(batch.kept, state.weight_version)
                    staleness = staleness_metrics(batch, state, config)
                with timer.phase("publish"):
                    state.weight_version += 1
                    publish_report = await runtime.scheduler.pool.publish(
                        state.weight_version, runtime.transport, wait_for_episodes=config.train.wait_for_episodes
                    )

                row = {
                    **await record_episodes(config, state, run_dir, runtime, batch, rollout_metrics, timer),
                    **_batch_metrics(batch, learner_metrics, publish_report),
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
                await validate_and_checkpoint(config, state, run_dir, runtime, metric_logger, row)
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
    config: GrpoRunConfig,
    state: TrainingState,
    run_dir: RunDir,
    runtime: Runtime,
    prefetcher: BatchPrefetcher,
    interrupt: Interrupt,
) -> RolloutBatch:
    """Return the batch of the current step.

    Raises:
        StopRequested: A stop was requested; the state before this step is checkpointed.
        LearnerDiedError: A rank of the learner died while the batch was rolled out.
    """
    try:
        return await interrupt.run_interruptible(
            runtime.learner.run_with_health_check(prefetcher.get_batch(state.step))
        )
    except StopRequested:
        await prefetcher.cancel()
        if state.step:
            await save_checkpoint(state, config, run_dir, runtime)
        raise


async def validate_and_checkpoint(
    config: GrpoRunConfig,
    state: TrainingState,
    run_dir: RunDir,
    runtime: Runtime,
    metric_logger: MetricLogger,
    row: Mapping[str, float],
) -> None:
    """Validate and write a checkpoint if the completed step is due; the last step always is checkpointed."""
    step, validate_every = state.step, config.train.validate_every
    validation_metrics: dict[str, float] = {}
    if validate_every and step % validate_every == 0:
        runtime.monitor.on_phase("evaluate")
        tasks = read_tasks(config.data.validation)
        eval_log = EvalLog(
            run_dir.path / "validation" / f"{step:06d}.jsonl",
            {"step": step, "tasks": config.data.validation},
        )
        results = await runtime.learner.run_with_health_check(
            evaluate(runtime.scheduler, tasks, eval_log, config.episode, stage="validation", step=step)
        )
        validation_metrics = {f"validation/{name}": value for name, value in step_metrics(results).items()}
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


def episode_records(batch: RolloutBatch, step: int, config: GrpoRunConfig) -> list[EpisodeRecord]:
    """Return a record of every sampled episode; records of kept groups include the advantage."""
    kept_groups = {id(group) for group in batch.kept}
    records = []
    for task, group in batch.sampled:
        advantages: list[float] = []
        if id(group) in kept_groups and len(group.rewards) == len(group.trajectories):
            advantages = outcome_advantages(group, config.learner.loss).tolist()
        records += [
            EpisodeRecord(task, trajectory, "train", step, advantage)
            for trajectory, advantage in zip_longest(group.trajectories, advantages)
        ]
    return records


def check_batch(batch: RolloutBatch, *, rewards_needed: bool = True) -> None:
    """Check that an episode of the batch succeeded and was scored; otherwise the next batch would fail too.

    Args:
        rewards_needed: Whether the loss uses the rewards.

    Raises:
        UserError: All episodes failed, or none was scored.
    """
    trajectories = [trajectory for _, group in batch.sampled for trajectory in group.trajectories]
    if all(trajectory.status is EpisodeStatus.FAILED for trajectory in trajectories):
        raise UserError(
            f"all {len(trajectories)} episodes of the step failed; the first error: {trajectories[0].error}"
        )
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    if rewards_needed and rewards and not any(reward.valid for reward in rewards):
        raise UserError(
            f"all {len(rewards)} scored episodes of the step are invalid; the last reason: {rewards[-1].note}"
        )


def check_teacher(batch: RolloutBatch, runtime: Runtime) -> None:
    """Check that the teacher, if there is one, scored a group of the batch.

    Raises:
        UserError: Every group was left out because its frames cannot be decoded again.
    """
    if runtime.teacher is not None and runtime.teacher.last_unreadable and not batch.kept:
        raise UserError(f"the teacher scored no group of the step; the last reason: {runtime.teacher.last_unreadable}")


def check_mismatch(row: Mapping[str, float], config: GrpoRunConfig) -> None:
    """Check that engine and learner agree on the log-probs of sampled tokens.

    Raises:
        UserError: The KL per token exceeds `train.max_mismatch_kl`.
    """
    max_kl = config.train.max_mismatch_kl
    for name, label in metric_names.MISMATCH_KL_LABELS.items():
        kl = row.get(name, 0.0)
        if kl > max_kl:
            raise UserError(
                f"engine and learner disagree{label}: the KL per token is {kl:.3g}, above train.max_mismatch_kl "
                f"({max_kl:g}); their weights or their frames differ"
            )


def staleness_metrics(batch: RolloutBatch, state: TrainingState, config: GrpoRunConfig) -> dict[str, float]:
    """Return share of sampled tokens by staleness, mean and maximum staleness, in updates.

    Raises:
        RuntimeError: A token exceeds `train.max_staleness`; this is a bug of the prefetcher.
    """
    histogram = staleness_histogram(batch.kept, state.weight_version)
    tokens = max(1, sum(histogram.values()))
    if histogram and not 0 <= max(histogram) <= config.train.max_staleness:
        raise RuntimeError(
            f"the maximum staleness is {max(histogram)} updates; it must be at most {config.train.max_staleness}: "
            f"{histogram}"
        )
    return {
        **{f"{metric_names.STALENESS_PREFIX}{age}": count / tokens for age, count in histogram.items()},
        metric_names.STALENESS_MEAN: sum(age * count for age, count in histogram.items()) / tokens,
        metric_names.STALENESS_MAX: float(max(histogram, default=0)),
    }


def _batch_metrics(
    batch: RolloutBatch, learner_metrics: Mapping[str, float], publish_report: PublishReport
) -> dict[str, float]:
    return {
        **{LEARNER_METRICS.get(name, f"learner/{name}"): value for name, value in learner_metrics.items()},
        "groups/sampled": float(len(batch.sampled)),
        "groups/kept": float(len(batch.kept)),
        metric_names.WEIGHT_VERSION: float(publish_report.version),
        metric_names.WEIGHT_SYNC_SECONDS: publish_report.sync_s,
        metric_names.WEIGHT_SYNC_BYTES: float(publish_report.nbytes),
        **publish_report.probe_metrics(),
    }


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
