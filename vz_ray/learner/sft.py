"""The loop of supervised fine-tuning, its resumable state, and the order of its trajectories.

`sft_loop` has two launchers: `training/sft.py` drives a learner of Ray actors, and `learner/torchrun.py` runs
the loop on every rank of a torchrun job. Checkpoints are interchangeable.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from vz_ray.config.sft import SftConfig
from vz_ray.env.trajectory import Trajectory
from vz_ray.learner.distributed import RankInfo, all_reduce_max, fail_together
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.log_context import set_log_context
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import ProgressStage
from vz_ray.utils.atomic_files import atomic_directory, partial_path, write_atomic
from vz_ray.utils.interrupt import Interrupt, StopRequested, describe_saved
from vz_ray.utils.step_dirs import list_steps, prune_steps, step_name

CHECKPOINT_INTERVAL_S = 30.0
"""Training seconds between checkpoints."""
STATE_FILE, LEARNER_DIR = "sft.json", "learner"
"""Parts of a checkpoint: the `SftState`, and the checkpoint of the learner."""


@dataclass(frozen=True, slots=True)
class SftState:
    """Progress of a supervised stage.

    Attributes:
        steps: Optimizer steps.
        seconds: Training time of these steps.
        samples: Trajectories processed, repetitions included.
    """

    steps: int = 0
    seconds: float = 0.0
    samples: int = 0

    @classmethod
    def load(cls, checkpoints: Path) -> SftState:
        """Return the state of the newest checkpoint, or the initial state without a checkpoint."""
        steps = list_steps(checkpoints)
        return cls(**json.loads((steps[-1] / STATE_FILE).read_text())) if steps else cls()

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint directory."""
        write_atomic(checkpoint / STATE_FILE, json.dumps(asdict(self)).encode())

    def is_done(self, config: SftConfig) -> bool:
        out_of_time = 0 < config.max_time_s <= self.seconds
        return out_of_time or self.steps >= config.max_steps


class SftLearner(Protocol):
    """The learner that `sft_loop` trains; `Learner` implements it."""

    async def sft_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]: ...

    async def save_checkpoint(self, directory: Path) -> None: ...

    async def load_checkpoint(self, directory: Path) -> None: ...


class TrainingObserver(Protocol):
    """Callbacks of a training loop."""

    def on_start(self, step: int, max_steps: int) -> None:
        """Training starts or resumes at `step`; `max_steps` is 0 if time is the limit."""
        return None

    def on_phase(self, phase: str) -> None:
        """A phase begins, such as `learn`."""
        return None

    def on_progress(self, done: int, row: Mapping[str, float]) -> None:
        """Step `done` has finished with the metrics `row`."""
        return None

    def on_checkpoint(self, step: int) -> None:
        """The checkpoint of `step` is complete."""
        return None


class NullObserver(TrainingObserver):
    """Ignores all callbacks."""


SINGLE_PROCESS = RankInfo(rank=0, world_size=1, device=torch.device("cpu"))
"""Rank info of a loop that runs in one process, such as the driver of a Ray run."""


async def sft_loop(
    learner: SftLearner,
    trajectories: Sequence[Trajectory],
    config: SftConfig,
    *,
    seed: int,
    checkpoints: Path,
    metric_logger: MetricLogger | None,
    stage: ProgressStage,
    interrupt: Interrupt,
    monitor: TrainingObserver | None = None,
    rank_info: RankInfo = SINGLE_PROCESS,
) -> SftState:
    """Train until `config` is fulfilled; resume from the newest checkpoint.

    With several ranks, every rank must call. All ranks stop, checkpoint and end at the same step.

    Args:
        seed: Seed of the order of trajectories.
        checkpoints: Directory of the stage's checkpoints.
        metric_logger: Receives the metrics of each step, counted from 1; None on ranks other than 0.
        stage: Progress display; advanced once per step.
        rank_info: Rank of this process if the loop runs on every rank.

    Raises:
        StopRequested: A stop was requested; the newest checkpoint holds all finished steps.
    """
    monitor = monitor or NullObserver()
    state = SftState.load(checkpoints)
    if state.steps:
        await learner.load_checkpoint(checkpoints / step_name(state.steps) / LEARNER_DIR)
    monitor.on_start(state.steps, 0 if config.max_time_s else config.max_steps)
    saved = state
    batches = batch_indices(len(trajectories), config.batch_size, seed, state.steps)
    while not state.is_done(config) and not _stop_requested(interrupt, rank_info):
        set_log_context(step=state.steps + 1)
        monitor.on_phase("learn")
        started = time.monotonic()
        batch = [trajectories[index] for index in next(batches)]
        metrics = await learner.sft_step(batch)
        # The clock of the slowest rank: all ranks checkpoint and end at the same step.
        seconds = all_reduce_max(time.monotonic() - started, rank_info)
        state = SftState(state.steps + 1, state.seconds + seconds, state.samples + len(batch))
        if metric_logger is not None:
            metric_logger.log(state.steps, metrics)
        row = {f"{metric_names.LEARNER_PREFIX}{name}": value for name, value in metrics.items()}
        monitor.on_progress(state.steps, row)
        stage.advance()
        if state.seconds - saved.seconds > CHECKPOINT_INTERVAL_S:
            await _save_checkpoint(learner, state, checkpoints, config.keep_checkpoints, monitor, rank_info)
            saved = state
    if saved != state:
        await _save_checkpoint(learner, state, checkpoints, config.keep_checkpoints, monitor, rank_info)
    if not state.is_done(config):
        reason = interrupt.reason if interrupt.requested else "stopped: another rank received a stop signal"
        raise StopRequested(f"{reason}; {describe_saved(state.steps)}")
    return state


def _stop_requested(interrupt: Interrupt, rank_info: RankInfo) -> bool:
    """Return whether any rank received a stop signal; all ranks must agree before the next step."""
    return bool(all_reduce_max(float(interrupt.requested), rank_info))


async def _save_checkpoint(
    learner: SftLearner,
    state: SftState,
    checkpoints: Path,
    keep: int,
    monitor: TrainingObserver,
    rank_info: RankInfo,
) -> None:
    """Write a checkpoint atomically and delete all but the newest `keep`."""
    monitor.on_phase("checkpoint")
    final = checkpoints / step_name(state.steps)
    with ExitStack() as stack:
        with fail_together(rank_info, f"creating {final}"):
            if rank_info.rank == 0:
                stack.enter_context(atomic_directory(final))
        partial = partial_path(final)
        await learner.save_checkpoint(partial / LEARNER_DIR)
        if rank_info.rank == 0:
            state.save(partial)
    with fail_together(rank_info, f"deleting old checkpoints of {checkpoints}"):
        if rank_info.rank == 0:
            prune_steps(checkpoints, keep)
    monitor.on_checkpoint(state.steps)


def batch_indices(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Yield the trajectory indices of each step from step `start`: shuffled, each index once per epoch."""
    if count < 1:
        raise ValueError("there are 0 trajectories to train on; at least 1 is required")
    step = start
    while True:
        positions = range(step * batch_size, (step + 1) * batch_size)
        yield [_shuffled(count, seed, position // count)[position % count] for position in positions]
        step += 1


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    indices = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(indices)
    return indices
