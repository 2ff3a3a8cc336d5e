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

from tests.learner.rank_worker import parameters, small_config, small_world
from vz_ray import run_state
from vz_ray.config.learner import LossConfig
from vz_ray.data.cursor import TaskCursor
from vz_ray.data.task import AnswerType, Task
from vz_ray.learner import checkpoint, sealed
from vz_ray.learner.distributed import leave
from vz_ray.learner.trainer import Trainer
from vz_ray.observe.run_dir import RunDir
from vz_ray.observe.steps import step_name
from vz_ray.run_state import LEARNER, RunState, newest
from vz_ray.weights.nccl import free_port

TASKS = [Task("t0", "v0.mp4", "what?", "A", AnswerType.MULTIPLE_CHOICE)]


@dataclass(frozen=True)
class Job:
    """Goes on with the run at `run`, or begins it.

    Attributes:
        until: Iterations after which it ends.
        stage: ZeRO stage.
        kill: Where to be killed in the last of these iterations; empty: nowhere.
        keep: Checkpoints kept.
        copy: Where to save once more what was loaded, before anything else.
        changes: Of the learner's settings.
    """

    model: Path
    run: Path
    until: int
    stage: int = 0
    kill: str = ""
    keep: int = 1
    copy: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def context() -> multiprocessing.context.ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.learner.preloaded"])
    return server


def go(job: Job, world: int = 1) -> list[int | None]:
    """Runs the job on so many ranks; returns their exit codes, -9 for one that was killed."""
    port = free_port()
    RunDir.begin(job.run, "name: run\n")
    ranks = [context().Process(target=work, args=(job, rank, world, port)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        if rank.is_alive():
            rank.kill()
    return [rank.exitcode for rank in ranks]


def said(job: Job, rank: int = 0) -> str:
    """What a rank of the last process said."""
    return (job.run / f"rank-{rank}.txt").read_text()[-3000:]


def work(job: Job, rank: int, world: int, port: int) -> None:
    log = os.open(job.run / f"rank-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1:
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    settings = {"loss": LossConfig(kl=0.0, entropy=0.01), "deadline_s": 60.0} | job.changes
    trainer = Trainer(small_config(job.model, job.stage, **settings))
    asyncio.run(train(job, trainer))
    whole = parameters(trainer)
    if rank == 0:
        np.savez(job.run / "weights.npz", **whole)
    leave()
    sys.stdout.flush()


async def train(job: Job, trainer: Trainer) -> None:
    run, groups = RunDir(job.run), small_world(job.model).groups
    state, found = RunState(TaskCursor(TASKS)), newest(run)
    if found is not None:
        state = RunState.load(found, TASKS)
        trainer.load_checkpoint(found / LEARNER)
        if job.copy is not None:
            trainer.save_checkpoint(job.copy)
    while state.iteration < job.until:
        if job.kill and state.iteration == job.until - 1:
            POINTS[job.kill]()
        learned = trainer.grpo_step([groups[state.iteration % len(groups)]], {**pixels(job.model)})
        note(job, trainer.place.rank, state.iteration, learned)
        state.close()
        await save(state, run, trainer, job.keep)


def pixels(model: Path) -> dict[str, Any]:
    return small_world(model).pixels


def note(job: Job, rank: int, iteration: int, learned: dict[str, float]) -> None:
    """A line for each iteration; the last of an iteration counts."""
    line = {"iteration": iteration, "noise": [torch.rand(1).item(), float(np.random.rand())]}
    line |= {name: learned[name] for name in ("loss", "grad_norm")}
    with (job.run / f"lines-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


async def save(state: RunState, run: RunDir, trainer: Trainer, keep: int) -> None:
    async def learner(directory: Path) -> None:
        trainer.save_checkpoint(directory)

    if trainer.place.rank == 0:
        await state.save(run, learner, keep)
    else:
        await learner(run.checkpoints / f".{step_name(state.iteration)}.partial" / LEARNER)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def between_files() -> None:
    """After the file of weights, before those of moments."""
    write, kinds = checkpoint.write_shards, []

    def second(*args: Any, **kwargs: Any) -> Any:
        if kinds:
            die()
        kinds.append(args)
        return write(*args, **kwargs)

    checkpoint.write_shards = second


def before_manifest() -> None:
    sealed.write_atomic = die


def before_rename(suffix: str) -> Callable[[], None]:
    """After all that the directory holds was written."""

    def install() -> None:
        rename = Path.rename

        def checked(self: Path, target: Path) -> Path:
            if self.name.endswith(suffix):
                die()
            return rename(self, target)

        Path.rename = checked  # type: ignore[method-assign]

    return install


def before_deleting() -> None:
    run_state.retire = die


def while_deleting() -> None:
    """An old checkpoint has lost some of its files."""

    remove = shutil.rmtree

    def half(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.endswith(".retired"):
            remove(path / LEARNER)
            die()
        remove(path, *args, **kwargs)

    shutil.rmtree = half


def while_learning() -> None:
    Trainer._update = die  # type: ignore[method-assign]


POINTS: dict[str, Callable[[], None]] = {
    "while learning": while_learning,
    "between files": between_files,
    "before the manifest": before_manifest,
    "before the learner's part is renamed": before_rename(".draft"),
    "before the whole is renamed": before_rename(".partial"),
    "before old ones are deleted": before_deleting,
    "while an old one is deleted": while_deleting,
}
SAVED = {"before old ones are deleted", "while an old one is deleted"}
"""Where the new checkpoint is there already."""
