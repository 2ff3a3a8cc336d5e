"""Supervised training on written turns, resumable: the cold start and its relatives."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from vz_ray.config.sft import SftConfig
from vz_ray.env.trajectory import Trajectory
from vz_ray.learner.learner import Learner
from vz_ray.learner.sft import CHECKPOINT_INTERVAL_S, LEARNER_DIR, SftState, batch_indices
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.log_context import set_log_context
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import ProgressStage
from vz_ray.utils.atomic_files import atomic_directory
from vz_ray.utils.interrupt import Interrupt
from vz_ray.utils.step_dirs import prune_steps, step_name

__all__ = ["TrainingObserver", "SftState", "batch_indices", "save_checkpoint", "sft_loop"]


class TrainingObserver(Protocol):
    """Who is told how training goes; see `watch.watch.Watch`."""

    def on_start(self, step: int, max_steps: int) -> None: ...

    def on_phase(self, phase: str) -> None: ...

    def on_progress(self, done: int, row: Mapping[str, float]) -> None: ...

    def on_checkpoint(self, step: int) -> None: ...


async def sft_loop(
    learner: Learner,
    trajectories: Sequence[Trajectory],
    config: SftConfig,
    *,
    seed: int,
    checkpoints: Path,
    metric_logger: MetricLogger,
    stage: ProgressStage,
    interrupt: Interrupt,
    monitor: TrainingObserver,
) -> SftState:
    """Trains to the end of `config`, from the newest of `checkpoints` if there is one.

    `metric_logger` gets the figures of each step, counted from 1, as the learner names them.

    Raises:
        StopRequested: A stop was asked for; the newest checkpoint holds everything up to the last step.
    """
    state = SftState.load(checkpoints)
    if state.steps:
        await learner.load_checkpoint(checkpoints / step_name(state.steps) / LEARNER_DIR)
    stage.advance(state.steps)
    monitor.on_start(state.steps, 0 if config.max_time_s else config.max_steps)
    saved = state
    batches = batch_indices(len(trajectories), config.batch_size, seed, state.steps)
    while not state.is_done(config) and not interrupt.requested:
        set_log_context(iteration=state.steps + 1)
        monitor.on_phase("learn")
        began = time.monotonic()
        batch = [trajectories[i] for i in next(batches)]
        metrics = await learner.sft_step(batch)
        state = replace(
            state,
            steps=state.steps + 1,
            seconds=state.seconds + time.monotonic() - began,
            samples=state.samples + len(batch),
        )
        metric_logger.log(state.steps, metrics)
        monitor.on_progress(
            state.steps, {f"{metric_names.LEARNER_PREFIX}{name}": v for name, v in metrics.items()}
        )
        stage.advance()
        if state.seconds - saved.seconds > CHECKPOINT_INTERVAL_S:
            await save_checkpoint(learner, state, checkpoints, config.keep_checkpoints, monitor)
            saved = state
    if saved != state:
        await save_checkpoint(learner, state, checkpoints, config.keep_checkpoints, monitor)
    interrupt.raise_if_requested()
    return state


async def save_checkpoint(
    learner: Learner, state: SftState, checkpoints: Path, keep: int, watch: TrainingObserver
) -> None:
    """Writes a checkpoint, whole or not at all; deletes all but the newest `keep`."""
    watch.on_phase("checkpoint")
    with atomic_directory(checkpoints / step_name(state.steps)) as partial:
        await learner.save_checkpoint(partial / LEARNER_DIR)
        state.save(partial)
    prune_steps(checkpoints, keep)
    watch.on_checkpoint(state.steps)
