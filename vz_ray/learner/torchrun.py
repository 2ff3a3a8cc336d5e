"""Supervised training without Ray: plain torch.distributed, one process per rank, as torchrun starts them.

    torchrun --nproc-per-node 2 -m vz_ray.learner sft conf/x.yaml model=... data=... name=...

The configuration, the run directory and its checkpoints are those of `vz-ray sft`: either goes on with what
the other left, on as many ranks. `learner.world_size` is torchrun's to say; `ray` and `clips` are not read, since
every rank decodes the frames of its own share in a thread of its own.

    all ranks    read the trajectories, take each step together, save and export together
    rank 0       holds the run directory, writes metrics, shows progress
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from vz_ray.config.learner import LearnerConfig
from vz_ray.config.load import load_config, to_yaml
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.sft_data import read_samples, read_sft_data
from vz_ray.env.trajectory import Trajectory
from vz_ray.learner.distributed import RankInfo, all_reduce_max, fail_together, init_distributed
from vz_ray.learner.frame_cache import CachedFrameLoader
from vz_ray.learner.policy_model import check_hf_checkpoint
from vz_ray.learner.sft import CHECKPOINT_INTERVAL_S, LEARNER_DIR, SftState, batch_indices
from vz_ray.learner.trainer import Metrics, Trainer
from vz_ray.monitoring import logging_config
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import Progress, ProgressStage
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.utils.atomic_files import atomic_directory, partial_path
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt, StopRequested
from vz_ray.utils.step_dirs import prune_steps, step_name
from vz_ray.video.local_source import LocalFrameSource

POLICY = "policy"
USAGE = "usage: torchrun --nproc-per-node N -m vz_ray.learner sft [CONFIG.yaml] [KEY=VALUE]..."


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, 2 for an error that the user can mend, 130 after a requested stop.

    Who ends the process then leaves the process group first; see `distributed.leave`.
    """
    os.environ |= {name: value for name, value in logging_config.QUIET_ENV.items() if name not in os.environ}
    try:
        train_sft(_settings(arguments))
    except UserError as error:
        if os.environ.get("VZ_RAY_DEBUG"):
            raise
        print(f"vz_ray.learner: {error}", file=sys.stderr)
        return 2
    except StopRequested as error:
        print(f"vz_ray.learner: {error}; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _settings(arguments: Sequence[str]) -> SftRunConfig:
    if not arguments or arguments[0] != "sft":
        raise UserError(USAGE)
    files = [a for a in arguments[1:] if a.endswith((".yaml", ".yml")) and "=" not in a]
    if len(files) > 1:
        raise UserError(f"two config files were given, {files[0]} and {files[1]}: one may extend the other")
    overrides = [a for a in arguments[1:] if a not in files]
    return load_config(SftRunConfig, files[0] if files else None, overrides)


def train_sft(config: SftRunConfig) -> Path:
    """Trains `config.model` on the trajectories of `config.data`, and exports it; every rank must call.

    Returns:
        The directory of the exported policy.

    Raises:
        UserError: A setting or a file is not as it should be, or another process writes the run.
        StopRequested: A stop was asked for; the checkpoint holds everything up to the last step.
    """
    place = init_distributed(config.learner.timeout_s)
    with ExitStack() as stack:
        with fail_together(place, "beginning the run"):
            check_hf_checkpoint(config.model)
            source = read_sft_data(config)
            run = RunDir(Path(config.runs) / config.name)
            if place.rank == 0:
                run, _ = RunDir.create_or_resume(run.path, to_yaml(config))
                stack.enter_context(run.lock())
                logging_config.configure_logging(
                    run.logs, identity=RunIdentity(config.name, config.monitoring.log_format)
                )
        out = run.path / "models" / POLICY
        progress = stack.enter_context(Progress(None if place.rank == 0 else Console(quiet=True)))
        if not out.exists():
            frames = stack.enter_context(LocalFrameSource(timeout_s=config.learner.timeout_s))
            store = CachedFrameLoader(
                frames, config.learner.frame_cache_mib * 2**20, config.learner.timeout_s
            )
            with fail_together(place, f"reading {config.data}"):
                read = source if isinstance(source, list) else store.run(read_samples(source, config, frames))
            trainer = Trainer(_learner(config, run, place))
            interrupt = stack.enter_context(Interrupt())
            TorchrunSft(trainer, config, run.checkpoints / POLICY, store).learn(
                read, run.path / f"{POLICY}.jsonl", progress, interrupt
            )
            trainer.export_hf(out)
        progress.print_line(f"the policy is in {out}")
    return out


def _learner(config: SftRunConfig, run: RunDir, place: RankInfo) -> LearnerConfig:
    """The learner's settings, with what the run and torchrun say."""
    own = config.learner
    rate = replace(own.optimizer, lr_schedule=config.sft.lr_schedule, total_steps=config.sft.max_steps)
    replay = own.replay_dir or str((run.path / "replay").resolve())
    return replace(own, model=config.model, world_size=place.world_size, optimizer=rate, replay_dir=replay)


class TorchrunSft:
    """The steps of one run."""

    def __init__(
        self, trainer: Trainer, config: SftRunConfig, checkpoints: Path, frames: CachedFrameLoader
    ) -> None:
        self._trainer, self._config, self._checkpoints, self._frames = trainer, config, checkpoints, frames
        self._place = trainer.rank_info

    def learn(
        self, trajectories: Sequence[Trajectory], metrics: Path, progress: Progress, interrupt: Interrupt
    ) -> None:
        """Trains to the end of `config.sft`, from the checkpoint if it is there."""
        length, state = self._config.sft, SftState.load(self._checkpoints)
        if state.steps:
            self._trainer.load_checkpoint(self._checkpoints / step_name(state.steps) / LEARNER_DIR)
        saved, batches = (
            state,
            batch_indices(len(trajectories), length.batch_size, self._config.seed, state.steps),
        )
        total = None if length.max_time_s else length.max_steps
        with ExitStack() as stack:
            log = stack.enter_context(MetricLogger(metrics, resume_step=state.steps)) if self._first else None
            stage = stack.enter_context(progress.stage(POLICY, total, state.steps))
            while not state.is_done(length) and not self._asked(interrupt):
                state, row = self._step(state, [trajectories[i] for i in next(batches)])
                self._tell(state, row, log, stage)
                if state.seconds - saved.seconds > CHECKPOINT_INTERVAL_S:
                    self._save(state)
                    saved = state
            if saved != state:
                self._save(state)
        if not state.is_done(length):
            raise StopRequested("stopped: a rank was asked to")

    @property
    def _first(self) -> bool:
        return self._place.rank == 0

    def _asked(self, interrupt: Interrupt) -> bool:
        """Whether any rank was asked to stop; all of them must know before the next step."""
        return bool(all_reduce_max(float(interrupt.requested), self._place))

    def _step(self, state: SftState, batch: list[Trajectory]) -> tuple[SftState, Metrics]:
        began = time.monotonic()
        row = self._trainer.sft_step(batch, self._frames)
        # The slowest rank's clock, so that all of them save, and end, at the same step.
        seconds = state.seconds + all_reduce_max(time.monotonic() - began, self._place)
        return SftState(state.steps + 1, seconds, state.samples + len(batch)), row

    def _tell(self, state: SftState, row: Metrics, log: MetricLogger | None, stage: ProgressStage) -> None:
        if log is not None:
            log.log(state.steps, row)
        stage.advance()

    def _save(self, state: SftState) -> None:
        """Writes a checkpoint, whole or not at all; deletes all but the newest."""
        final = self._checkpoints / step_name(state.steps)
        with ExitStack() as stack:
            with fail_together(self._place, f"preparing {final}"):
                if self._first:
                    stack.enter_context(atomic_directory(final))
            partial = partial_path(final)
            self._trainer.save_checkpoint(partial / LEARNER_DIR)
            if self._first:
                state.save(partial)
        with fail_together(self._place, f"keeping {final}"):
            if self._first:
                prune_steps(self._checkpoints, self._config.sft.keep_checkpoints)
