"""Supervised training on written turns, resumable: the cold start and its relatives."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from vz_ray.config.coldstart import SftConfig
from vz_ray.episode.trajectory import Trajectory
from vz_ray.learner.actor import LearnerGroup
from vz_ray.observe import names
from vz_ray.observe.interrupt import Interrupt
from vz_ray.observe.metrics import MetricLog
from vz_ray.observe.progress import Stage
from vz_ray.observe.records import turn_to
from vz_ray.observe.run_dir import whole_directory, write_atomic

SAVE_EVERY_S = 30.0
"""Training seconds between checkpoints."""
STATE, LEARNER = "sft.json", "learner"


class Onlooker(Protocol):
    """Who is told how training goes; see `watch.watch.Watch`."""

    def begun(self, iteration: int, iterations: int) -> None: ...

    def doing(self, phase: str) -> None: ...

    def stepped(self, done: int, row: Mapping[str, float]) -> None: ...

    def saved(self, iteration: int) -> None: ...


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
    def load(cls, checkpoint: Path) -> SftState:
        """That of a checkpoint; the beginning if there is none."""
        path = checkpoint / STATE
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def done(self, config: SftConfig) -> bool:
        late = 0 < config.max_seconds <= self.seconds
        return late or self.steps >= config.steps


async def supervise(
    learner: LearnerGroup,
    trajectories: Sequence[Trajectory],
    config: SftConfig,
    *,
    seed: int,
    checkpoint: Path,
    log: MetricLog,
    stage: Stage,
    interrupt: Interrupt,
    watch: Onlooker,
) -> SftState:
    """Trains to the end of `config`, from `checkpoint` if it is there.

    `log` gets the figures of each step, counted from 1, as the learner names them.

    Raises:
        StopRequested: A stop was asked for; `checkpoint` holds everything up to the last step.
    """
    state = SftState.load(checkpoint)
    if state.steps:
        await learner.load_checkpoint(checkpoint / LEARNER)
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
            await save(learner, state, checkpoint, watch)
            saved = state
    if saved != state:
        await save(learner, state, checkpoint, watch)
    interrupt.check()
    return state


async def save(learner: LearnerGroup, state: SftState, checkpoint: Path, watch: Onlooker) -> None:
    """Writes a checkpoint, whole or not at all."""
    watch.doing("checkpoint")
    content = {"steps": state.steps, "seconds": state.seconds, "samples": state.samples}
    with whole_directory(checkpoint) as partial:
        await learner.save_checkpoint(partial / LEARNER)
        write_atomic(partial / STATE, json.dumps(content).encode())
    watch.saved(state.steps)


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
