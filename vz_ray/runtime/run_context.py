"""Context of a run: directory, lock, progress display, signal handlers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vz_ray.config import to_yaml
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import MUTABLE_ON_RESUME, GrpoRunConfig, RolloutRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.chat_format_loader import check_episode_format
from vz_ray.jobs.doctor import check_disk, check_memory, check_shared_memory
from vz_ray.learner.policy_model import check_hf_checkpoint
from vz_ray.monitoring import logging_config
from vz_ray.monitoring.checks import require_checks
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir, record_stage_time
from vz_ray.rollout.engine_args import check_engine_options
from vz_ray.runtime.monitor_run import check_monitoring
from vz_ray.utils.interrupt import Interrupt

POLICY_STAGE = "policy"
"""Stage name of the policy that `vz-ray train` and `vz-ray sft` export."""


@dataclass
class RunContext:
    """Context that every stage of a run receives.

    Attributes:
        run_identity: Run name and log format, passed to every actor.
    """

    run_dir: RunDir
    progress: Progress
    interrupt: Interrupt
    run_identity: RunIdentity

    def model_dir(self, stage: str) -> Path:
        """Return the directory of the exported model of a stage."""
        return self.run_dir.path / "models" / stage

    def replay_dir(self, learner: LearnerConfig) -> str:
        """Return the directory for the batches of skipped updates."""
        return learner.replay_dir or str((self.run_dir.path / "replay").resolve())

    @contextmanager
    def time_stage(self, stage: str) -> Iterator[None]:
        """Record the wall time of a stage, also if it is interrupted."""
        start = time.monotonic()
        try:
            yield
        finally:
            record_stage_time(self.run_dir.path, stage, time.monotonic() - start)


@contextmanager
def open_run(config: RolloutRunConfig | SftRunConfig) -> Iterator[RunContext]:
    """Create or resume the run directory, start the progress display, install signal handlers.

    The run lock is held until the context exits.

    Raises:
        UserError: This machine, the model, its chat format, the monitoring config or an engine option fails a
            check, another process holds the lock, or the config differs from the one that the run started with.
    """
    require_checks(check_disk(Path(config.runs)))
    if not config.ray.address:  # a private cluster runs engines and learner on this machine
        require_checks(check_memory(), check_shared_memory())
    check_hf_checkpoint(config.model)
    check_episode_format(config.model, config.episode)
    check_monitoring(config.monitoring)
    if isinstance(config, RolloutRunConfig):
        check_engine_options(config.rollout.engine)
    if isinstance(config, GrpoRunConfig) and config.teacher.enabled:
        check_hf_checkpoint(config.teacher.model)
        check_episode_format(config.teacher.model, config.episode)
        check_engine_options(config.teacher.engine)
    settings = to_yaml(config)
    run_dir, resumed = RunDir.create_or_resume(Path(config.runs) / config.name, settings, MUTABLE_ON_RESUME)
    identity = RunIdentity(config.name, config.monitoring.log_format)
    logging_config.configure_logging(run_dir.logs, identity=identity)
    with run_dir.lock(), Progress() as progress, Interrupt() as interrupt:
        if resumed:
            run_dir.update_config(settings)
            progress.print_line(f"resuming {run_dir.path}")
        yield RunContext(run_dir, progress, interrupt, identity)


def report_finished(run: RunContext) -> bool:
    """Return whether the run has exported its policy before; if so, print where it is and how to continue."""
    model = run.model_dir(POLICY_STAGE)
    if model.exists():
        run.progress.print_line(f"the run is finished: {model}; to train further, start a run with model={model}")
    return model.exists()
