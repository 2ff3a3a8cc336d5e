"""A small training run in one process per rank that can kill itself while it writes a checkpoint."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.learner.rank_worker import parameters, small_config, small_training_data
from vz_ray.config.loss import LossConfig
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import AnswerType, Task
from vz_ray.learner import checkpoint, checkpoint_files
from vz_ray.learner.distributed import shutdown_distributed
from vz_ray.learner.trainer import Trainer
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.training import state
from vz_ray.training.state import LEARNER_DIR, TrainingState, latest_checkpoint
from vz_ray.utils.ports import find_free_port
from vz_ray.utils.step_dirs import step_name

TASKS = [Task("t0", "v0.mp4", "what?", "A", AnswerType.MULTIPLE_CHOICE)]


@dataclass(frozen=True)
class TrainingJob:
    """Start the run at `run`, or resume it.

    Attributes:
        stop_after: Number of steps.
        stage: ZeRO stage.
        crash_point: Point of the last step at which the process kills itself; empty for none.
        keep: Number of checkpoints to keep.
        copy_to: Directory for a copy of the loaded checkpoint, written before the first step.
        changes: Changes to the learner's config.
    """

    model: Path
    run: Path
    stop_after: int
    stage: int = 0
    crash_point: str = ""
    keep: int = 1
    copy_to: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def forkserver() -> multiprocessing.context.ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.learner.forkserver_preload"])
    return server


def run_job(job: TrainingJob, world_size: int = 1) -> list[int | None]:
    """Run the job on `world_size` ranks; return their exit codes, -9 for a killed rank."""
    port = find_free_port()
    RunDir.create_or_resume(job.run, "name: run\n")
    ranks = [forkserver().Process(target=run_rank, args=(job, rank, world_size, port)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        if rank.is_alive():
            rank.kill()
    return [rank.exitcode for rank in ranks]


def read_output(job: TrainingJob, rank: int = 0) -> str:
    """Return the end of a rank's output in the last run."""
    return (job.run / f"rank-{rank}.txt").read_text()[-3000:]


def run_rank(job: TrainingJob, rank: int, world_size: int, port: int) -> None:
    log = os.open(job.run / f"rank-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world_size > 1:
        variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    settings = {"loss": LossConfig(kl_coef=0.0, entropy_coef=0.01), "timeout_s": 60.0} | job.changes
    trainer = Trainer(small_config(job.model, job.stage, **settings))
    asyncio.run(train(job, trainer))
    weights = parameters(trainer)
    if rank == 0:
        np.savez(job.run / "weights.npz", **weights)
    shutdown_distributed()
    sys.stdout.flush()


async def train(job: TrainingJob, trainer: Trainer) -> None:
    run, groups = RunDir(job.run), small_training_data(job.model).groups
    state, newest = TrainingState(TaskSampler(TASKS)), latest_checkpoint(run)
    if newest is not None:
        state = TrainingState.load(newest, TASKS)
        trainer.load_checkpoint(newest / LEARNER_DIR)
        if job.copy_to is not None:
            trainer.save_checkpoint(job.copy_to)
    while state.step < job.stop_after:
        if job.crash_point and state.step == job.stop_after - 1:
            CRASH_POINTS[job.crash_point]()
        learned = trainer.grpo_step([groups[state.step % len(groups)]], {**pixels(job.model)})
        record_step(job, trainer.rank_info.rank, state.step, learned)
        state.finish_step()
        await save(state, run, trainer, job.keep)


def pixels(model: Path) -> dict[str, Any]:
    return small_training_data(model).pixels


def record_step(job: TrainingJob, rank: int, iteration: int, learned: dict[str, float]) -> None:
    """Append a line for this step; the last line of a step counts."""
    line = {"iteration": iteration, "noise": [torch.rand(1).item(), float(np.random.rand())]}
    line |= {name: learned[name] for name in ("loss", "grad_norm")}
    with (job.run / f"lines-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


async def save(state: TrainingState, run: RunDir, trainer: Trainer, keep: int) -> None:
    async def learner(directory: Path) -> None:
        trainer.save_checkpoint(directory)

    if trainer.rank_info.rank == 0:
        await state.save(run, learner, keep)
    else:
        await learner(run.checkpoints / f".{step_name(state.step)}.partial" / LEARNER_DIR)


def kill_self(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash_between_files() -> None:
    """Crash after the weights file, before the moments files."""
    write, calls = checkpoint.write_shards, []

    def write_once(*args: Any, **kwargs: Any) -> Any:
        if calls:
            kill_self()
        calls.append(args)
        return write(*args, **kwargs)

    checkpoint.write_shards = write_once


def crash_before_manifest() -> None:
    checkpoint_files.write_atomic = kill_self


def crash_before_rename(suffix: str) -> Callable[[], None]:
    """Crash after all files of the directory were written."""

    def install() -> None:
        rename = Path.rename

        def checked(self: Path, target: Path) -> Path:
            if self.name.endswith(suffix):
                kill_self()
            return rename(self, target)

        Path.rename = checked  # type: ignore[method-assign]

    return install


def crash_before_deleting() -> None:
    state.prune_steps = kill_self


def crash_while_deleting() -> None:
    """Crash when an old checkpoint is partly deleted."""

    remove = shutil.rmtree

    def half(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.endswith(".retired"):
            remove(path / LEARNER_DIR)
            kill_self()
        remove(path, *args, **kwargs)

    shutil.rmtree = half


def crash_while_learning() -> None:
    Trainer._update = kill_self  # type: ignore[method-assign]


CRASH_POINTS: dict[str, Callable[[], None]] = {
    "during the step": crash_while_learning,
    "between files": crash_between_files,
    "before the manifest": crash_before_manifest,
    "before the learner's part is renamed": crash_before_rename(".staging"),
    "before the weights is renamed": crash_before_rename(".partial"),
    "before old ones are deleted": crash_before_deleting,
    "while an old one is deleted": crash_while_deleting,
}
POINTS_AFTER_SAVE = {"before old ones are deleted", "while an old one is deleted"}
"""Crash points at which the new checkpoint is complete."""
