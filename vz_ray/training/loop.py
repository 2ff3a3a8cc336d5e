"""GRPO on zooming episodes; one iteration is the paper's algorithm box.

    play groups of episodes until enough of them teach something   fleet   (dynamic sampling)
    take a learner step on them: advantages, losses, updates        learner
    bring the new weights to every engine, verified                 fleet
    log; checkpoint and evaluate when due

With `train.max_staleness: 0` engines and learner take turns, and every token comes from the
weights that it is learned with; with k, engines play on while the learner works, and a token is
at most k updates old (`rollout/ahead.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import zip_longest

from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.episode_record import EpisodeRecord, append_records
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.trajectory import EpisodeStatus, SamplingParams
from vz_ray.eval.eval_log import EvalLog
from vz_ray.eval.eval_metrics import step_metrics
from vz_ray.eval.runner import evaluate
from vz_ray.learner.advantage import compute_advantages, is_informative
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.log_context import set_log_context
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rollout.batch_collector import RolloutBatch, collect_batch
from vz_ray.rollout.batch_prefetcher import BatchPrefetcher, staleness_histogram
from vz_ray.rollout.rollout_metrics import RolloutMetrics
from vz_ray.runtime.runtime import Runtime
from vz_ray.training.state import TrainingState, delete_outputs_from, latest_checkpoint
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt, StopRequested
from vz_ray.weight_sync import PublishReport

LEARNER_METRICS = {
    "loss": metric_names.LOSS,
    "entropy": metric_names.ENTROPY,
    "kl": metric_names.KL_TO_REFERENCE,
    "grad_norm": metric_names.GRAD_NORM,
    "skipped": metric_names.SKIPPED_UPDATES,
    "mismatch_abs_max": metric_names.MISMATCH_LOGPROB_MAX,
    "mismatch_kl": metric_names.MISMATCH_KL,
    "mismatch_abs_max_after_image": "mismatch/logprob_abs_max_after_image",
    "mismatch_kl_after_image": metric_names.MISMATCH_KL_IMAGE,
    "mismatch_abs_max_after_text": "mismatch/logprob_abs_max_after_text",
    "mismatch_kl_after_text": metric_names.MISMATCH_KL_TEXT,
    "mismatch_abs_max_stale": "staleness/logprob_abs_max",
    "mismatch_kl_stale": "staleness/kl",
}

PROGRESS_METRICS = (
    metric_names.REWARD_TOTAL,
    metric_names.REWARD_ACCURACY,
    metric_names.ZOOM_VALID_RATE,
    metric_names.MISMATCH_KL,
    metric_names.WEIGHT_SYNC_SECONDS,
)
"""Metrics that the terminal shows."""


async def train(
    config: GrpoRunConfig, run_dir: RunDir, runtime: Runtime, progress: Progress, interrupt: Interrupt
) -> TrainingState:
    """Trains to the last iteration, from the newest checkpoint if there is one.

    Raises:
        StopRequested: A stop was asked for; the checkpoint holds everything up to the last whole iteration.
        LearnerLost: A rank of the learner died; once the learner is started again, so may this be.
        UserError: Engine and learner disagree beyond `train.max_mismatch_kl`.
    """
    state, watch = await initialize_state(config, run_dir, runtime), runtime.monitor
    total = config.train.max_steps
    watch.on_start(state.step, total, config.train.max_mismatch_kl)
    batches = BatchPrefetcher(
        lambda iteration: collect_step_batch(config, state, runtime, iteration),
        config.train.max_staleness,
        total,
    )
    figures = RolloutMetrics()
    async with batches as ahead:
        with (
            MetricLogger(
                run_dir.metrics,
                run_dir.path / "tensorboard",
                resume_step=state.step - 1,
                trackers=watch.trackers,
            ) as log,
            progress.stage("rl", total, state.step) as stage,
        ):
            while state.step < total:
                set_log_context(step=state.step)
                clock = _PhaseTimer()
                watch.on_phase("rollout")
                batch = await next_batch(config, state, run_dir, runtime, ahead, interrupt)
                check_batch(batch)
                clock.record("rollout")
                watch.on_phase("learn")
                learned = await runtime.learner.grpo_step(batch.kept, state.weight_version)
                ages = staleness_metrics(batch, state, config)
                clock.record("learn")
                watch.on_phase("publish")
                state.weight_version += 1
                published = await runtime.scheduler.publish(
                    state.weight_version, runtime.transport, wait_for_episodes=config.train.wait_for_episodes
                )
                clock.record("publish")

                records = episode_records(batch, state.step, config)
                append_records(run_dir.episodes / f"{state.step:06d}.jsonl", records)
                row = {
                    **step_metrics(records),
                    **_figures(batch, learned, published),
                    **ages,
                    **clock.seconds,
                }
                row |= figures.compute(await runtime.scheduler.worker_stats(), sum(clock.seconds.values()))
                row |= {"data/epoch": state.cursor.epoch}
                log.log(state.step, row)
                watch.on_rl_step(state.step, row, len(batch.sampled), len(batch.kept))
                progress.show_metrics({name: row[name] for name in PROGRESS_METRICS if name in row})
                check_mismatch(row, config)

                state.finish_step()
                stage.advance()
                await validate_and_checkpoint(config, state, run_dir, runtime, log, row)
                watch.on_step_end(state.step - 1)
    return state


async def initialize_state(config: GrpoRunConfig, run: RunDir, runtime: Runtime) -> TrainingState:
    """The state to go on from; engines and learner hold its weights when this returns."""
    tasks = read_tasks(config.data.train)
    check_videos(tasks, config.data.train)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        state = TrainingState(TaskSampler(tasks, config.seed))
    else:
        state = TrainingState.load(checkpoint, tasks)
        await runtime.learner.load_checkpoint(checkpoint / "learner")
    delete_outputs_from(run, state.step)
    # Whatever the engines hold, perhaps another stage's model: from here on it is the learner's.
    state.weight_version = max(state.weight_version, runtime.scheduler.version) + 1
    await runtime.scheduler.publish(state.weight_version, runtime.transport)
    return state


async def collect_step_batch(
    config: GrpoRunConfig, state: TrainingState, runtime: Runtime, step: int
) -> RolloutBatch:
    """One iteration's episodes."""
    wanted = config.train
    return await collect_batch(
        runtime.scheduler,
        state.tasks_for_step(step),
        state.sample_tracker,
        step=step,
        batch_size=wanted.batch_size,
        max_sampled_tasks=wanted.max_sampled_tasks,
        group_size=wanted.group_size,
        extra_samples=wanted.extra_samples,
        sampling=SamplingParams(wanted.temperature, 1.0, config.episode.max_turn_tokens, config.seed),
        keep=lambda group: is_informative(group, config.learner.loss.min_reward_std),
    )


async def next_batch(
    config: GrpoRunConfig,
    state: TrainingState,
    run: RunDir,
    runtime: Runtime,
    prefetcher: BatchPrefetcher,
    interrupt: Interrupt,
) -> RolloutBatch:
    """The batch to learn from, not played to its end for a learner that died meanwhile.

    A stop asked for meanwhile leaves a checkpoint from before it.
    """
    try:
        return await interrupt.run_interruptible(
            runtime.learner.run_with_health_check(prefetcher.get_batch(state.step))
        )
    except StopRequested:
        await prefetcher.cancel()
        if state.step:
            await save_checkpoint(state, config, run, runtime)
        raise


async def validate_and_checkpoint(
    config: GrpoRunConfig,
    state: TrainingState,
    run: RunDir,
    runtime: Runtime,
    metric_logger: MetricLogger,
    row: Mapping[str, float],
) -> None:
    """Evaluates and checkpoints if this iteration is due; the last one always is."""
    done, every, wanted = state.step, config.train.validate_every, config.train
    measured: dict[str, float] = {}
    if every and done % every == 0:
        runtime.monitor.on_phase("evaluate")
        tasks = read_tasks(config.data.validation)
        path = run.path / "validation" / f"{done:06d}.jsonl"
        answers = EvalLog(path, {"iteration": done, "tasks": config.data.validation})
        playing = evaluate(runtime.scheduler, tasks, answers, config.episode, stage="validation", step=done)
        results = await runtime.learner.run_with_health_check(playing)
        measured = {f"validation/{name}": value for name, value in step_metrics(results).items()}
        metric_logger.log(done - 1, measured)
    due = done % wanted.checkpoint_every == 0 or done == wanted.max_steps
    if due or (wanted.keep_best and measured):
        await save_checkpoint(
            state, config, run, runtime, checkpoint_metric(measured if every else row, every)
        )


def checkpoint_metric(row: Mapping[str, float], evaluate_every: int) -> tuple[str, float] | None:
    """What a checkpoint is compared with others by, see `train.keep_best`; None if `row` does not say."""
    name = f"validation/{metric_names.REWARD_ACCURACY}" if evaluate_every else metric_names.REWARD_TOTAL
    return (name, row[name]) if name in row else None


async def save_checkpoint(
    state: TrainingState,
    config: GrpoRunConfig,
    run: RunDir,
    runtime: Runtime,
    metric: tuple[str, float] | None = None,
) -> None:
    runtime.monitor.on_phase("checkpoint")
    kept = config.train
    await state.save(run, runtime.learner.save_checkpoint, kept.keep_checkpoints, kept.keep_best, metric)
    runtime.monitor.on_checkpoint(state.step)


def episode_records(batch: RolloutBatch, step: int, config: GrpoRunConfig) -> list[EpisodeRecord]:
    """Every episode played, with the advantage of those that were learned from."""
    learned = {id(group) for group in batch.kept}
    kind = config.learner.loss.advantage_estimator
    records = []
    for task, group in batch.sampled:
        values = (
            [float(value) for value in compute_advantages(group.rewards, kind)]
            if id(group) in learned
            else []
        )
        records += [
            EpisodeRecord(task, trajectory, "train", step, value)
            for trajectory, value in zip_longest(group.trajectories, values)
        ]
    return records


def check_batch(batch: RolloutBatch) -> None:
    """`UserError` if no episode of a batch could be played, or none judged: the next would fare no better."""
    played = [trajectory for _, group in batch.sampled for trajectory in group.trajectories]
    if all(trajectory.status is EpisodeStatus.FAILED for trajectory in played):
        raise UserError(
            f"all {len(played)} episodes of an iteration failed, the first with: {played[0].error}"
        )
    parts = [trajectory.reward for trajectory in played if trajectory.reward is not None]
    if parts and not any(part.valid for part in parts):
        raise UserError(
            f"none of the {len(parts)} episodes of an iteration could be judged, the last: {parts[-1].note}"
        )


def check_mismatch(row: Mapping[str, float], config: GrpoRunConfig) -> None:
    """`UserError` if what the engine sampled from is not what the learner computes with the same weights."""
    most = config.train.max_mismatch_kl
    for name, where in metric_names.MISMATCH_KL_LABELS.items():
        found = row.get(name, 0.0)
        if found > most:
            raise UserError(
                f"engine and learner disagree{where}: KL {found:.3g} per token, above train.max_mismatch_kl "
                f"({most:g}); they do not hold the same weights or do not see the same frames"
            )


def staleness_metrics(batch: RolloutBatch, state: TrainingState, config: GrpoRunConfig) -> dict[str, float]:
    """How many updates behind the sampled tokens were: the shares by age, mean and most.

    Raises:
        RuntimeError: One was more than `train.max_staleness` behind: a bug of the schedule.
    """
    ages = staleness_histogram(batch.kept, state.weight_version)
    tokens = max(1, sum(ages.values()))
    if ages and not 0 <= max(ages) <= config.train.max_staleness:
        raise RuntimeError(f"tokens are {max(ages)} updates old, above {config.train.max_staleness}: {ages}")
    return {
        **{f"{metric_names.STALENESS_PREFIX}{age}": count / tokens for age, count in ages.items()},
        metric_names.STALENESS_MEAN: sum(age * count for age, count in ages.items()) / tokens,
        metric_names.STALENESS_MAX: float(max(ages, default=0)),
    }


def _figures(batch: RolloutBatch, learned: Mapping[str, float], published: PublishReport) -> dict[str, float]:
    """One iteration's metrics besides those of its episodes."""
    return {
        **{LEARNER_METRICS.get(name, f"learner/{name}"): value for name, value in learned.items()},
        "groups/sampled": float(len(batch.sampled)),
        "groups/kept": float(len(batch.kept)),
        metric_names.WEIGHT_VERSION: float(published.version),
        metric_names.WEIGHT_SYNC_SECONDS: published.sync_s,
    }


class _PhaseTimer:
    """Seconds between laps, under the names of the metrics."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()

    def record(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[f"{metric_names.TIME_PREFIX}{part}_seconds"] = now - self._at
        self._at = now
