"""Supervised fine-tuning without Ray: one process per rank, started by torchrun.

    torchrun --nproc-per-node 2 -m vz_ray.learner sft conf/x.yaml model=... data=... name=...

Configuration, run directory and checkpoints are those of `vz-ray sft`. Each command resumes the other's
runs, on any number of ranks. torchrun sets the number of ranks in place of `learner.world_size`. The `ray`
and `clips` sections are ignored: every rank decodes the frames of its share in a thread.

    all ranks    read the trajectories, take each step, save and export together
    rank 0       locks the run directory, writes metrics, displays progress
"""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from vz_ray.config.learner import LearnerConfig
from vz_ray.config.load import load_config, split_arguments, to_yaml
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.sft_data import read_samples, read_sft_data
from vz_ray.env.trajectory import Trajectory
from vz_ray.learner.distributed import RankInfo, fail_together, init_distributed
from vz_ray.learner.frame_cache import CachedFrameLoader
from vz_ray.learner.policy_model import check_hf_checkpoint
from vz_ray.learner.sft import SftState, sft_loop
from vz_ray.learner.trainer import Trainer
from vz_ray.monitoring import logging_config
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.planning.sequence_parallel import check_checkpoint_heads
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt, StopRequested
from vz_ray.video.local_source import LocalFrameSource

T = TypeVar("T")

POLICY = "policy"
USAGE = "usage: torchrun --nproc-per-node N -m vz_ray.learner sft [CONFIG.yaml] [KEY=VALUE]..."


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status: 0, 2 for a user error, 130 after a requested stop.

    The caller ends the process group before it exits; see `distributed.shutdown_distributed`.
    """
    os.environ |= {name: value for name, value in logging_config.QUIET_ENV.items() if name not in os.environ}
    try:
        train_sft(_parse(arguments))
    except UserError as error:
        if os.environ.get("VZ_RAY_DEBUG"):
            raise
        print(f"vz_ray.learner: {error}", file=sys.stderr)
        return 2
    except StopRequested as error:
        print(f"vz_ray.learner: {error}. Run the same command to resume.", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str]) -> SftRunConfig:
    if not arguments or arguments[0] != "sft":
        raise UserError(USAGE)
    return load_config(SftRunConfig, *split_arguments(arguments[1:]))


def train_sft(config: SftRunConfig) -> Path:
    """Train `config.model` on the trajectories of `config.data` and export it; every rank must call.

    Returns:
        The directory of the exported policy.

    Raises:
        UserError: A setting or a file is invalid, or another process holds the run directory.
        StopRequested: A stop was requested; the checkpoint holds all finished steps.
    """
    check_checkpoint_heads(config.model, config.learner)
    rank_info = init_distributed(config.learner.timeout_s, config.learner.sequence_parallel_size)
    is_main = rank_info.rank == 0
    with ExitStack() as stack:
        with fail_together(rank_info, "opening the run"):
            check_hf_checkpoint(config.model)
            source = read_sft_data(config)
            run = RunDir(Path(config.runs) / config.name)
            if is_main:
                run, _ = RunDir.create_or_resume(run.path, to_yaml(config))
                stack.enter_context(run.lock())
                identity = RunIdentity(config.name, config.monitoring.log_format)
                logging_config.configure_logging(run.logs, identity=identity)
        export_dir = run.path / "models" / POLICY
        progress = stack.enter_context(Progress(None if is_main else Console(quiet=True)))
        if not export_dir.exists():
            frame_source = stack.enter_context(LocalFrameSource(timeout_s=config.learner.timeout_s))
            frames = CachedFrameLoader(frame_source, config.learner.frame_cache_bytes, config.learner.timeout_s)
            with fail_together(rank_info, f"reading {config.data}"):
                trajectories = (
                    source if isinstance(source, list) else frames.run(read_samples(source, config, frame_source))
                )
            trainer = Trainer(_learner_config(config, run, rank_info))
            interrupt = stack.enter_context(Interrupt())
            _run_loop(TrainerLearner(trainer, frames), trajectories, config, run, progress, interrupt)
            trainer.export_hf(export_dir)
        progress.print_line(f"the policy is in {export_dir}")
    return export_dir


def _learner_config(config: SftRunConfig, run: RunDir, rank_info: RankInfo) -> LearnerConfig:
    """Return the learner's config with the values that the run and torchrun determine."""
    learner = config.learner
    return replace(
        learner,
        model=config.model,
        world_size=rank_info.world_size,
        optimizer=replace(learner.optimizer, lr_schedule=config.sft.lr_schedule, total_steps=config.sft.max_steps),
        replay_dir=learner.replay_dir or str((run.path / "replay").resolve()),
    )


def _run_loop(
    learner: TrainerLearner,
    trajectories: Sequence[Trajectory],
    config: SftRunConfig,
    run: RunDir,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    checkpoints, sft = run.checkpoints / POLICY, config.sft
    resume_step = SftState.load(checkpoints).steps
    with ExitStack() as stack:
        metric_logger = None
        if learner.rank_info.rank == 0:
            metrics_file = run.path / f"{POLICY}.jsonl"
            metric_logger = stack.enter_context(MetricLogger(metrics_file, resume_step=resume_step))
        total = None if sft.max_time_s else sft.max_steps
        stage = stack.enter_context(progress.stage(POLICY, total, resume_step))
        _run_synchronously(
            sft_loop(
                learner,
                trajectories,
                sft,
                seed=config.seed,
                checkpoints=checkpoints,
                metric_logger=metric_logger,
                stage=stage,
                interrupt=interrupt,
                rank_info=learner.rank_info,
            )
        )


class TrainerLearner:
    """`SftLearner` over the trainer of this process. Its methods never suspend."""

    def __init__(self, trainer: Trainer, frames: CachedFrameLoader) -> None:
        self._trainer, self._frames = trainer, frames
        self.rank_info = trainer.rank_info

    async def sft_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        return self._trainer.sft_step(trajectories, self._frames) | self._frames.take_metrics()

    async def save_checkpoint(self, directory: Path) -> None:
        self._trainer.save_checkpoint(directory)

    async def load_checkpoint(self, directory: Path) -> None:
        self._trainer.load_checkpoint(directory)


def _run_synchronously(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, without an event loop: the frame loader runs its own."""
    try:
        coroutine.send(None)
    except StopIteration as result:
        return result.value
    raise RuntimeError(f"{coroutine!r} suspended; every await in it must complete immediately")
