"""Supervised training on written turns, resumable: the cold start and its relatives."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from vz_ray.config.coldstart import SftConfig
from vz_ray.episode.trajectory import Trajectory
from vz_ray.learner.actor import LearnerGroup
from vz_ray.learner.sft_state import LEARNER, SAVE_EVERY_S, SftState, batches_of
from vz_ray.observe import names
from vz_ray.observe.interrupt import Interrupt
from vz_ray.observe.metrics import MetricLog
from vz_ray.observe.progress import Stage
from vz_ray.observe.records import turn_to
from vz_ray.observe.run_dir import whole_directory
from vz_ray.observe.steps import retire, step_name

__all__ = ["Onlooker", "SftState", "batches_of", "save", "supervise"]


class Onlooker(Protocol):
    """Who is told how training goes; see `watch.watch.Watch`."""

    def begun(self, iteration: int, iterations: int) -> None: ...

    def doing(self, phase: str) -> None: ...

    def stepped(self, done: int, row: Mapping[str, float]) -> None: ...

    def saved(self, iteration: int) -> None: ...


async def supervise(
    learner: LearnerGroup,
    trajectories: Sequence[Trajectory],
    config: SftConfig,
    *,
    seed: int,
    checkpoints: Path,
    log: MetricLog,
    stage: Stage,
    interrupt: Interrupt,
    watch: Onlooker,
) -> SftState:
    """Trains to the end of `config`, from the newest of `checkpoints` if there is one.

    `log` gets the figures of each step, counted from 1, as the learner names them.

    Raises:
        StopRequested: A stop was asked for; the newest checkpoint holds everything up to the last step.
    """
    state = SftState.load(checkpoints)
    if state.steps:
        await learner.load_checkpoint(checkpoints / step_name(state.steps) / LEARNER)
    stage.advance(state.steps)
    watch.begun(state.steps, 0 if config.max_seconds else config.steps)
    saved = state
    batches = batches_of(len(trajectories), config.batch, seed, state.steps)
    while not state.done(config) and not interrupt.requested:
        turn_to(iteration=state.steps + 1)
        watch.doing("learn")
        began = time.monotonic()
        batch = [trajectories[i] for i in next(batches)]
        metrics = await learner.sft_step(batch)
        state = replace(
            state,
            steps=state.steps + 1,
            seconds=state.seconds + time.monotonic() - began,
            samples=state.samples + len(batch),
        )
        log.log(state.steps, metrics)
        watch.stepped(state.steps, {f"{names.LEARNER_PREFIX}{name}": v for name, v in metrics.items()})
        stage.advance()
        if state.seconds - saved.seconds > SAVE_EVERY_S:
            await save(learner, state, checkpoints, config.keep_checkpoints, watch)
            saved = state
    if saved != state:
        await save(learner, state, checkpoints, config.keep_checkpoints, watch)
    interrupt.check()
    return state


async def save(learner: LearnerGroup, state: SftState, checkpoints: Path, keep: int, watch: Onlooker) -> None:
    """Writes a checkpoint, whole or not at all; deletes all but the newest `keep`."""
    watch.doing("checkpoint")
    with whole_directory(checkpoints / step_name(state.steps)) as partial:
        await learner.save_checkpoint(partial / LEARNER)
        state.write(partial)
    retire(checkpoints, keep)
    watch.saved(state.steps)
