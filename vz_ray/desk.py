"""What every stage of a run works with: its directory, its display, and how it is stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vz_ray.config import to_yaml
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import MAY_CHANGE, PlayConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.doctor import disk, memory, shared_memory
from vz_ray.evaluate.summary import record_stage
from vz_ray.learner.model import check_checkpoint
from vz_ray.observe import logs
from vz_ray.observe.checks import require
from vz_ray.observe.interrupt import Interrupt
from vz_ray.observe.progress import Progress
from vz_ray.observe.records import Badge
from vz_ray.observe.run_dir import RunDir
from vz_ray.watch.watching import check_observers


@dataclass
class Desk:
    """What every stage needs.

    Attributes:
        badge: What the run's actors are given, to say whose they are.
    """

    run: RunDir
    progress: Progress
    interrupt: Interrupt
    badge: Badge

    def model(self, stage: str) -> Path:
        """Where the model that a stage makes is exported to."""
        return self.run.path / "models" / stage

    def replay(self, learner: LearnerConfig) -> str:
        """Where a learner keeps the batches of updates that it skips."""
        return learner.replay or str((self.run.path / "replay").resolve())

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Notes the wall time of a part of the run, also where it is interrupted."""
        began = time.monotonic()
        try:
            yield
        finally:
            record_stage(self.run.path, stage, time.monotonic() - began)


@contextmanager
def desk(config: PlayConfig | SftRunConfig) -> Iterator[Desk]:
    """Opens the run directory, the display and the signal handlers; the run is held until the block ends."""
    require(memory(), shared_memory(), disk(Path(config.runs)))
    check_checkpoint(config.model)
    check_observers(config.observe)
    settings = to_yaml(config)
    run, resumed = RunDir.begin(Path(config.runs) / config.name, settings, MAY_CHANGE)
    badge = Badge(config.name, config.observe.log_format)
    logs.configure(run.logs, badge=badge)
    with run.held(), Progress() as progress, Interrupt() as interrupt:
        if resumed:
            run.adopt(settings)
            progress.say(f"going on with {run.path}")
        yield Desk(run, progress, interrupt, badge)
