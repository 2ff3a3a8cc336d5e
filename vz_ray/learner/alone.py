"""Supervised training without Ray: plain torch.distributed, one process per rank, as torchrun starts them.

    torchrun --nproc-per-node 2 -m vz_ray.learner sft conf/x.yaml model=... data=... name=...

The configuration, the run directory and its checkpoints are those of `vz-ray sft`: either goes on with what
the other left, on as many ranks. `learner.ranks` is torchrun's to say; `ray` and `clips` are not read, since
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
from vz_ray.config.load import load, to_yaml
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.sft_source import read_samples, read_source
from vz_ray.episode.trajectory import Trajectory
from vz_ray.learner.distributed import Place, agree, join, largest
from vz_ray.learner.frames import FrameStore
from vz_ray.learner.model import check_checkpoint
from vz_ray.learner.sft_state import LEARNER, SAVE_EVERY_S, SftState, batches_of
from vz_ray.learner.trainer import Metrics, Trainer
from vz_ray.observe import logs
from vz_ray.observe.errors import UserError
from vz_ray.observe.interrupt import Interrupt, StopRequested
from vz_ray.observe.metrics import MetricLog
from vz_ray.observe.progress import Progress, Stage
from vz_ray.observe.records import Badge
from vz_ray.observe.run_dir import RunDir, partial_of, whole_directory
from vz_ray.observe.steps import retire, step_name
from vz_ray.video.local import LocalFrames

POLICY = "policy"
USAGE = "usage: torchrun --nproc-per-node N -m vz_ray.learner sft [CONFIG.yaml] [KEY=VALUE]..."


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, 2 for an error that the user can mend, 130 after a requested stop.

    Who ends the process then leaves the process group first; see `distributed.leave`.
    """
    os.environ |= {name: value for name, value in logs.QUIET.items() if name not in os.environ}
    try:
        sft(_settings(arguments))
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
    return load(SftRunConfig, files[0] if files else None, overrides)


def sft(config: SftRunConfig) -> Path:
    """Trains `config.model` on the trajectories of `config.data`, and exports it; every rank must call.

    Returns:
        The directory of the exported policy.

    Raises:
        UserError: A setting or a file is not as it should be, or another process writes the run.
        StopRequested: A stop was asked for; the checkpoint holds everything up to the last step.
    """
    place = join(config.learner.deadline_s)
    with ExitStack() as stack:
        with agree(place, "beginning the run"):
            check_checkpoint(config.model)
            source = read_source(config)
            run = RunDir(Path(config.runs) / config.name)
            if place.rank == 0:
                run, _ = RunDir.begin(run.path, to_yaml(config))
                stack.enter_context(run.held())
                logs.configure(run.logs, badge=Badge(config.name, config.observe.log_format))
        out = run.path / "models" / POLICY
        progress = stack.enter_context(Progress(None if place.rank == 0 else Console(quiet=True)))
        if not out.exists():
            frames = stack.enter_context(LocalFrames(deadline_s=config.learner.deadline_s))
            store = FrameStore(frames, config.learner.frame_cache_mib * 2**20, config.learner.deadline_s)
            with agree(place, f"reading {config.data}"):
                read = source if isinstance(source, list) else store.run(read_samples(source, config, frames))
            trainer = Trainer(_learner(config, run, place))
            interrupt = stack.enter_context(Interrupt())
            _Supervised(trainer, config, run.checkpoints / POLICY, store).learn(
                read, run.path / f"{POLICY}.jsonl", progress, interrupt
            )
            trainer.export_hf(out)
        progress.say(f"the policy is in {out}")
    return out


def _learner(config: SftRunConfig, run: RunDir, place: Place) -> LearnerConfig:
    """The learner's settings, with what the run and torchrun say."""
    own = config.learner
    rate = replace(own.optimizer, schedule=config.sft.schedule, total_steps=config.sft.steps)
    replay = own.replay or str((run.path / "replay").resolve())
    return replace(own, model=config.model, ranks=place.world, optimizer=rate, replay=replay)


class _Supervised:
    """The steps of one run."""

    def __init__(self, trainer: Trainer, config: SftRunConfig, checkpoints: Path, frames: FrameStore) -> None:
        self._trainer, self._config, self._checkpoints, self._frames = trainer, config, checkpoints, frames
        self._place = trainer.place

    def learn(
        self, trajectories: Sequence[Trajectory], metrics: Path, progress: Progress, interrupt: Interrupt
    ) -> None:
        """Trains to the end of `config.sft`, from the checkpoint if it is there."""
        length, state = self._config.sft, SftState.load(self._checkpoints)
        if state.steps:
            self._trainer.load_checkpoint(self._checkpoints / step_name(state.steps) / LEARNER)
        saved, batches = state, batches_of(len(trajectories), length.batch, self._config.seed, state.steps)
        total = None if length.max_seconds else length.steps
        with ExitStack() as stack:
            log = stack.enter_context(MetricLog(metrics, resume_after=state.steps)) if self._first else None
            stage = stack.enter_context(progress.stage(POLICY, total, state.steps))
            while not state.done(length) and not self._asked(interrupt):
                state, row = self._step(state, [trajectories[i] for i in next(batches)])
                self._tell(state, row, log, stage)
                if state.seconds - saved.seconds > SAVE_EVERY_S:
                    self._save(state)
                    saved = state
            if saved != state:
                self._save(state)
        if not state.done(length):
            raise StopRequested("stopped: a rank was asked to")

    @property
    def _first(self) -> bool:
        return self._place.rank == 0

    def _asked(self, interrupt: Interrupt) -> bool:
        """Whether any rank was asked to stop; all of them must know before the next step."""
        return bool(largest(float(interrupt.requested), self._place))

    def _step(self, state: SftState, batch: list[Trajectory]) -> tuple[SftState, Metrics]:
        began = time.monotonic()
        row = self._trainer.sft_step(batch, self._frames)
        # The slowest rank's clock, so that all of them save, and end, at the same step.
        seconds = state.seconds + largest(time.monotonic() - began, self._place)
        return SftState(state.steps + 1, seconds, state.samples + len(batch)), row

    def _tell(self, state: SftState, row: Metrics, log: MetricLog | None, stage: Stage) -> None:
        if log is not None:
            log.log(state.steps, row)
        stage.advance()

    def _save(self, state: SftState) -> None:
        """Writes a checkpoint, whole or not at all; deletes all but the newest."""
        final = self._checkpoints / step_name(state.steps)
        with ExitStack() as stack:
            with agree(self._place, f"preparing {final}"):
                if self._first:
                    stack.enter_context(whole_directory(final))
            partial = partial_of(final)
            self._trainer.save_checkpoint(partial / LEARNER)
            if self._first:
                state.write(partial)
        with agree(self._place, f"keeping {final}"):
            if self._first:
                retire(self._checkpoints, self._config.sft.keep_checkpoints)
