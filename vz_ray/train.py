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

from vz_ray.actors import Actors
from vz_ray.config.run import RunConfig
from vz_ray.data.cursor import TaskCursor
from vz_ray.data.record import EpisodeRecord, append_records
from vz_ray.data.rl_file import check_videos, read_tasks
from vz_ray.episode.trajectory import Sampling, Status
from vz_ray.evaluate.metrics import step_metrics
from vz_ray.evaluate.play import evaluate
from vz_ray.evaluate.results import EvalLog
from vz_ray.learner.advantage import advantages, is_informative
from vz_ray.observe import names
from vz_ray.observe.errors import UserError
from vz_ray.observe.interrupt import Interrupt, StopRequested
from vz_ray.observe.metrics import MetricLog
from vz_ray.observe.progress import Progress
from vz_ray.observe.records import turn_to
from vz_ray.observe.run_dir import RunDir
from vz_ray.rollout.ahead import Ahead, staleness
from vz_ray.rollout.collect import Batch, collect
from vz_ray.rollout.figures import FleetFigures
from vz_ray.run_state import RunState, forget_after, newest
from vz_ray.weights import PublishReport

LEARNER_NAMES = {
    "loss": names.LOSS,
    "entropy": names.ENTROPY,
    "kl": names.KL_TO_REFERENCE,
    "grad_norm": names.GRAD_NORM,
    "skipped": names.SKIPPED,
    "mismatch_abs_max": names.MISMATCH_MAX,
    "mismatch_kl": names.MISMATCH_KL,
    "mismatch_abs_max_after_image": "mismatch/logprob_abs_max_after_image",
    "mismatch_kl_after_image": names.MISMATCH_KL_IMAGE,
    "mismatch_abs_max_after_text": "mismatch/logprob_abs_max_after_text",
    "mismatch_kl_after_text": names.MISMATCH_KL_TEXT,
    "mismatch_abs_max_stale": "staleness/logprob_abs_max",
    "mismatch_kl_stale": "staleness/kl",
}

SHOWN = (names.REWARD_TOTAL, names.REWARD_ACCURACY, names.ZOOM_VALID_RATE, names.MISMATCH_KL, names.SYNC_S)
"""Metrics that the terminal shows."""


async def train(
    config: RunConfig, run: RunDir, actors: Actors, progress: Progress, interrupt: Interrupt
) -> RunState:
    """Trains to the last iteration, from the newest checkpoint if there is one.

    Raises:
        StopRequested: A stop was asked for; the checkpoint holds everything up to the last whole iteration.
        LearnerLost: A rank of the learner died; once the learner is started again, so may this be.
        UserError: Engine and learner disagree beyond `train.max_mismatch_kl`.
    """
    state, watch = await begin(config, run, actors), actors.watch
    total = config.train.iterations
    watch.begun(state.iteration, total, config.train.max_mismatch_kl)
    batches = Ahead(
        lambda iteration: play(config, state, actors, iteration), config.train.max_staleness, total
    )
    figures = FleetFigures()
    async with batches as ahead:
        with (
            MetricLog(
                run.metrics,
                run.path / "tensorboard",
                resume_after=state.iteration - 1,
                trackers=watch.trackers,
            ) as log,
            progress.stage("rl", total, state.iteration) as stage,
        ):
            while state.iteration < total:
                turn_to(iteration=state.iteration)
                clock = _Clock()
                watch.doing("rollout")
                batch = await next_batch(config, state, run, actors, ahead, interrupt)
                stop_on_failures(batch)
                clock.lap("rollout")
                watch.doing("learn")
                learned = await actors.learner.grpo_step(batch.kept, state.weight_version)
                ages = token_ages(batch, state, config)
                clock.lap("learn")
                watch.doing("publish")
                state.weight_version += 1
                published = await actors.fleet.publish(
                    state.weight_version, actors.sender, finish_first=config.train.finish_before_update
                )
                clock.lap("publish")

                records = records_of(batch, state.iteration, config)
                append_records(run.episodes / f"{state.iteration:06d}.jsonl", records)
                row = {**step_metrics(records), **_figures(batch, learned, published), **ages, **clock.laps}
                row |= figures.step(await actors.fleet.stats(), sum(clock.laps.values()))
                row |= {"data/epoch": state.cursor.epoch}
                log.log(state.iteration, row)
                watch.iterated(state.iteration, row, len(batch.played), len(batch.kept))
                progress.show({name: row[name] for name in SHOWN if name in row})
                stop_on_mismatch(row, config)

                state.close()
                stage.advance()
                await validate_and_save(config, state, run, actors, log, row)
                watch.closed(state.iteration - 1)
    return state


async def begin(config: RunConfig, run: RunDir, actors: Actors) -> RunState:
    """The state to go on from; engines and learner hold its weights when this returns."""
    tasks = read_tasks(config.data.train)
    check_videos(tasks, config.data.train)
    checkpoint = newest(run)
    if checkpoint is None:
        state = RunState(TaskCursor(tasks, config.seed))
    else:
        state = RunState.load(checkpoint, tasks)
        await actors.learner.load_checkpoint(checkpoint / "learner")
    forget_after(run, state.iteration)
    # Whatever the engines hold, perhaps another stage's model: from here on it is the learner's.
    state.weight_version = max(state.weight_version, actors.fleet.version) + 1
    await actors.fleet.publish(state.weight_version, actors.sender)
    return state


async def play(config: RunConfig, state: RunState, actors: Actors, iteration: int) -> Batch:
    """One iteration's episodes."""
    wanted = config.train
    return await collect(
        actors.fleet,
        state.tasks_of(iteration),
        state.ledger,
        iteration=iteration,
        tasks=wanted.tasks,
        max_tasks=wanted.max_tasks,
        samples=wanted.samples,
        spare=wanted.spare_samples,
        sampling=Sampling(wanted.temperature, 1.0, config.episode.max_turn_tokens, config.seed),
        keep=lambda group: is_informative(group, config.learner.loss.min_reward_std),
    )


async def next_batch(
    config: RunConfig, state: RunState, run: RunDir, actors: Actors, ahead: Ahead, interrupt: Interrupt
) -> Batch:
    """The batch to learn from, not played to its end for a learner that died meanwhile.

    A stop asked for meanwhile leaves a checkpoint from before it.
    """
    try:
        return await interrupt.watch(actors.learner.watch(ahead.batch(state.iteration)))
    except StopRequested:
        await ahead.give_up()
        if state.iteration:
            await save(state, config, run, actors)
        raise


async def validate_and_save(
    config: RunConfig, state: RunState, run: RunDir, actors: Actors, log: MetricLog, row: Mapping[str, float]
) -> None:
    """Evaluates and checkpoints if this iteration is due; the last one always is."""
    done, every, wanted = state.iteration, config.train.evaluate_every, config.train
    measured: dict[str, float] = {}
    if every and done % every == 0:
        actors.watch.doing("evaluate")
        tasks = read_tasks(config.data.validation)
        path = run.path / "validation" / f"{done:06d}.jsonl"
        answers = EvalLog(path, {"iteration": done, "tasks": config.data.validation})
        playing = evaluate(actors.fleet, tasks, answers, config.episode, stage="validation", step=done)
        results = await actors.learner.watch(playing)
        measured = {f"validation/{name}": value for name, value in step_metrics(results).items()}
        log.log(done - 1, measured)
    due = done % wanted.checkpoint_every == 0 or done == wanted.iterations
    if due or (wanted.keep_best and measured):
        await save(state, config, run, actors, figure_of(measured if every else row, every))


def figure_of(row: Mapping[str, float], evaluate_every: int) -> tuple[str, float] | None:
    """What a checkpoint is compared with others by, see `train.keep_best`; None if `row` does not say."""
    name = f"validation/{names.REWARD_ACCURACY}" if evaluate_every else names.REWARD_TOTAL
    return (name, row[name]) if name in row else None


async def save(
    state: RunState, config: RunConfig, run: RunDir, actors: Actors, figure: tuple[str, float] | None = None
) -> None:
    actors.watch.doing("checkpoint")
    kept = config.train
    await state.save(run, actors.learner.save_checkpoint, kept.keep_checkpoints, kept.keep_best, figure)
    actors.watch.saved(state.iteration)


def records_of(batch: Batch, iteration: int, config: RunConfig) -> list[EpisodeRecord]:
    """Every episode played, with the advantage of those that were learned from."""
    learned = {id(group) for group in batch.kept}
    kind = config.learner.loss.advantage
    records = []
    for task, group in batch.played:
        values = [float(value) for value in advantages(group.rewards, kind)] if id(group) in learned else []
        records += [
            EpisodeRecord(task, trajectory, "train", iteration, value)
            for trajectory, value in zip_longest(group.trajectories, values)
        ]
    return records


def stop_on_failures(batch: Batch) -> None:
    """`UserError` if no episode of a batch could be played, or none judged: the next would fare no better."""
    played = [trajectory for _, group in batch.played for trajectory in group.trajectories]
    if all(trajectory.status is Status.FAILED for trajectory in played):
        raise UserError(
            f"all {len(played)} episodes of an iteration failed, the first with: {played[0].error}"
        )
    parts = [trajectory.reward for trajectory in played if trajectory.reward is not None]
    if parts and not any(part.valid for part in parts):
        raise UserError(
            f"none of the {len(parts)} episodes of an iteration could be judged, the last: {parts[-1].note}"
        )


def stop_on_mismatch(row: Mapping[str, float], config: RunConfig) -> None:
    """`UserError` if what the engine sampled from is not what the learner computes with the same weights."""
    most = config.train.max_mismatch_kl
    for name, where in names.MISMATCH_PARTS.items():
        found = row.get(name, 0.0)
        if found > most:
            raise UserError(
                f"engine and learner disagree{where}: KL {found:.3g} per token, above train.max_mismatch_kl "
                f"({most:g}); they do not hold the same weights or do not see the same frames"
            )


def token_ages(batch: Batch, state: RunState, config: RunConfig) -> dict[str, float]:
    """How many updates behind the sampled tokens were: the shares by age, mean and most.

    Raises:
        RuntimeError: One was more than `train.max_staleness` behind: a bug of the schedule.
    """
    ages = staleness(batch.kept, state.weight_version)
    tokens = max(1, sum(ages.values()))
    if ages and not 0 <= max(ages) <= config.train.max_staleness:
        raise RuntimeError(f"tokens are {max(ages)} updates old, above {config.train.max_staleness}: {ages}")
    return {
        **{f"{names.STALENESS_PREFIX}{age}": count / tokens for age, count in ages.items()},
        names.STALENESS_MEAN: sum(age * count for age, count in ages.items()) / tokens,
        names.STALENESS_MAX: float(max(ages, default=0)),
    }


def _figures(batch: Batch, learned: Mapping[str, float], published: PublishReport) -> dict[str, float]:
    """One iteration's metrics besides those of its episodes."""
    return {
        **{LEARNER_NAMES.get(name, f"learner/{name}"): value for name, value in learned.items()},
        "groups/played": float(len(batch.played)),
        "groups/kept": float(len(batch.kept)),
        names.WEIGHT_VERSION: float(published.version),
        names.SYNC_S: published.sync_s,
    }


class _Clock:
    """Seconds between laps, under the names of the metrics."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._at = time.monotonic()

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self.laps[f"{names.TIME_PREFIX}{part}_s"] = now - self._at
        self._at = now
