"""Supervised training on written turns, resumable: the cold start and its relatives."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vz_ray.config.coldstart import SftConfig
from vz_ray.episode.trajectory import Trajectory
from vz_ray.learner.actor import LearnerGroup
from vz_ray.observe.interrupt import Interrupt
from vz_ray.observe.metrics import MetricLog
from vz_ray.observe.progress import Stage
from vz_ray.observe.run_dir import whole_directory, write_atomic
from vz_ray.observe.steps import retire, step_name, steps_in

SAVE_EVERY_S = 30.0
"""Training seconds between checkpoints."""
STATE, LEARNER = "sft.json", "learner"


@dataclass(frozen=True, slots=True)
class SftState:
    """How far a supervised stage has come.

    Attributes:
        steps: Optimizer steps done.
        seconds: Training seconds spent on them.
        samples: Trajectories seen, repetitions counted.
    """

    steps: int = 0
    seconds: float = 0.0
    samples: int = 0

    @classmethod
    def load(cls, checkpoints: Path) -> SftState:
        """That of the newest checkpoint; the beginning if there is none."""
        found = steps_in(checkpoints)
        return cls(**json.loads((found[-1] / STATE).read_text())) if found else cls()

    def done(self, config: SftConfig) -> bool:
        late = 0 < config.max_seconds <= self.seconds
        return late or self.steps >= config.steps


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
) -> SftState:
    """Trains to the end of `config`, from the newest of `checkpoints` if there is one.

    Raises:
        StopRequested: A stop was asked for; the newest checkpoint holds everything up to the last step.
    """
    state = SftState.load(checkpoints)
    if state.steps:
        await learner.load_checkpoint(checkpoints / step_name(state.steps) / LEARNER)
    stage.advance(state.steps)
    saved = state
    batches = batches_of(len(trajectories), config.batch, seed, state.steps)
    while not state.done(config) and not interrupt.requested:
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
        stage.advance()
        if state.seconds - saved.seconds > SAVE_EVERY_S:
            await save(learner, state, checkpoints, config.keep_checkpoints)
            saved = state
    if saved != state:
        await save(learner, state, checkpoints, config.keep_checkpoints)
    interrupt.check()
    return state


async def save(learner: LearnerGroup, state: SftState, checkpoints: Path, keep: int) -> None:
    """Writes a checkpoint, whole or not at all; deletes all but the newest `keep`."""
    content = {"steps": state.steps, "seconds": state.seconds, "samples": state.samples}
    with whole_directory(checkpoints / step_name(state.steps)) as partial:
        await learner.save_checkpoint(partial / LEARNER)
        write_atomic(partial / STATE, json.dumps(content).encode())
    retire(checkpoints, keep)


def batches_of(count: int, batch: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Indices of each step's trajectories from step `start` on: every trajectory once an epoch, shuffled."""
    if count < 1:
        raise ValueError("no trajectories to train on")
    step = start
    while True:
        yield [_order(count, seed, at // count)[at % count] for at in range(step * batch, (step + 1) * batch)]
        step += 1


def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
