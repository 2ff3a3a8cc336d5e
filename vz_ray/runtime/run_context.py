"""What every stage of a run works with: its directory, its display, and how it is stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vz_ray.config import to_yaml
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import MUTABLE_ON_RESUME, RolloutRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.doctor import check_disk, check_memory, check_shared_memory
from vz_ray.learner.policy_model import check_hf_checkpoint
from vz_ray.monitoring import logging_config
from vz_ray.monitoring.checks import require_checks
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.monitoring.stage_times import record_stage_time
from vz_ray.runtime.monitor_run import check_monitoring
from vz_ray.utils.interrupt import Interrupt


@dataclass
class RunContext:
    """What every stage needs.

    Attributes:
        run_identity: What the run's actors are given, to say whose they are.
    """

    run_dir: RunDir
    progress: Progress
    interrupt: Interrupt
    run_identity: RunIdentity

    def model_dir(self, stage: str) -> Path:
        """Where the model that a stage makes is exported to."""
        return self.run_dir.path / "models" / stage

    def replay_dir(self, learner: LearnerConfig) -> str:
        """Where a learner keeps the batches of updates that it skips."""
        return learner.replay_dir or str((self.run_dir.path / "replay_dir").resolve())

    @contextmanager
    def time_stage(self, stage: str) -> Iterator[None]:
        """Notes the wall time of a part of the run, also where it is interrupted."""
        began = time.monotonic()
        try:
            yield
        finally:
            record_stage_time(self.run_dir.path, stage, time.monotonic() - began)


@contextmanager
def open_run(config: RolloutRunConfig | SftRunConfig) -> Iterator[RunContext]:
    """Opens the run directory, the display and the signal handlers; the run is held until the block ends."""
    require_checks(check_memory(), check_shared_memory(), check_disk(Path(config.runs)))
    check_hf_checkpoint(config.model)
    check_monitoring(config.monitoring)
    settings = to_yaml(config)
    run, resumed = RunDir.create_or_resume(Path(config.runs) / config.name, settings, MUTABLE_ON_RESUME)
    badge = RunIdentity(config.name, config.monitoring.log_format)
    logging_config.configure_logging(run.logs, identity=badge)
    with run.lock(), Progress() as progress, Interrupt() as interrupt:
        if resumed:
            run.update_config(settings)
            progress.print_line(f"going on with {run.path}")
        yield RunContext(run, progress, interrupt, badge)
