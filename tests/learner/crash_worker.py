"""A small training run, each rank a process of its own that may kill itself while a checkpoint is written."""

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
from vz_ray.config.learner import LossConfig
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import AnswerType, Task
from vz_ray.learner import checkpoint, checkpoint_files
from vz_ray.learner.distributed import shutdown_distributed
from vz_ray.learner.trainer import Trainer
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.training import state
from vz_ray.training.state import LEARNER_DIR, TrainingState, latest_checkpoint
from vz_ray.utils.step_dirs import step_name
from vz_ray.weight_sync.nccl_broadcast import find_free_port

TASKS = [Task("t0", "v0.mp4", "what?", "A", AnswerType.MULTIPLE_CHOICE)]


@dataclass(frozen=True)
class TrainingJob:
    """Goes on with the run at `run`, or begins it.

    Attributes:
        stop_after: Iterations after which it ends.
        stage: ZeRO stage.
        crash_point: Where to be killed in the last of these iterations; empty: nowhere.
        keep: Checkpoints kept.
        copy_to: Where to save once more what was loaded, before anything else.
        changes: Of the learner's settings.
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


def run_job(job: TrainingJob, world: int = 1) -> list[int | None]:
    """Runs the job on so many ranks; returns their exit codes, -9 for one that was killed."""
    port = find_free_port()
    RunDir.create_or_resume(job.run, "name: run\n")
    ranks = [forkserver().Process(target=run_rank, args=(job, rank, world, port)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        if rank.is_alive():
            rank.kill()
    return [rank.exitcode for rank in ranks]


def read_output(job: TrainingJob, rank: int = 0) -> str:
    """What a rank of the last process said."""
    return (job.run / f"rank-{rank}.txt").read_text()[-3000:]


def run_rank(job: TrainingJob, rank: int, world: int, port: int) -> None:
    log = os.open(job.run / f"rank-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1:
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    settings = {"loss": LossConfig(kl_coef=0.0, entropy_coef=0.01), "timeout_s": 60.0} | job.changes
    trainer = Trainer(small_config(job.model, job.stage, **settings))
    asyncio.run(train(job, trainer))
    whole = parameters(trainer)
    if rank == 0:
        np.savez(job.run / "weights.npz", **whole)
    shutdown_distributed()
    sys.stdout.flush()


async def train(job: TrainingJob, trainer: Trainer) -> None:
    run, groups = RunDir(job.run), small_training_data(job.model).groups
    state, found = TrainingState(TaskSampler(TASKS)), latest_checkpoint(run)
    if found is not None:
        state = TrainingState.load(found, TASKS)
        trainer.load_checkpoint(found / LEARNER_DIR)
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
    """A line for each iteration; the last of an iteration counts."""
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


def between_files() -> None:
    """After the file of weights, before those of moments."""
    write, kinds = checkpoint.write_shards, []

    def second(*args: Any, **kwargs: Any) -> Any:
        if kinds:
            kill_self()
        kinds.append(args)
        return write(*args, **kwargs)

    checkpoint.write_shards = second


def before_manifest() -> None:
    checkpoint_files.write_atomic = kill_self


def before_rename(suffix: str) -> Callable[[], None]:
    """After all that the directory holds was written."""

    def install() -> None:
        rename = Path.rename

        def checked(self: Path, target: Path) -> Path:
            if self.name.endswith(suffix):
                kill_self()
            return rename(self, target)

        Path.rename = checked  # type: ignore[method-assign]

    return install


def before_deleting() -> None:
    state.prune_steps = kill_self


def while_deleting() -> None:
    """An old checkpoint has lost some of its files."""

    remove = shutil.rmtree

    def half(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.endswith(".retired"):
            remove(path / LEARNER_DIR)
            kill_self()
        remove(path, *args, **kwargs)

    shutil.rmtree = half


def while_learning() -> None:
    Trainer._update = kill_self  # type: ignore[method-assign]


CRASH_POINTS: dict[str, Callable[[], None]] = {
    "while learning": while_learning,
    "between files": between_files,
    "before the manifest": before_manifest,
    "before the learner's part is renamed": before_rename(".staging"),
    "before the whole is renamed": before_rename(".partial"),
    "before old ones are deleted": before_deleting,
    "while an old one is deleted": while_deleting,
}
POINTS_AFTER_SAVE = {"before old ones are deleted", "while an old one is deleted"}
"""Where the new checkpoint is there already."""
