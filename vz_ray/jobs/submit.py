"""`vz-ray submit`: check a command, upload the working directory, submit a Ray job, follow its output."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vz_ray.config import load_config
from vz_ray.jobs.job_client import JobClient, JobInfo, resolve_address
from vz_ray.jobs.job_lifecycle import JobSpec, find_job, follow_job, stop_job, submit_job
from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.jobs.working_dir import MIB, package_working_dir
from vz_ray.utils.durations import format_duration
from vz_ray.utils.errors import UserError

CHECK_SUFFIX = "check"
"""Jobs that only look are called by the run's name and this."""
_STOP_SLACK_S = 60.0


def config_class(command: str) -> type[Any]:
    """The config of a command that can be a job.

    Raises:
        UserError: It cannot.
    """
    if command == "train":
        from vz_ray.config.run import GrpoRunConfig

        return GrpoRunConfig
    if command == "sft":
        from vz_ray.config.sft import SftRunConfig

        return SftRunConfig
    if command == "eval":
        from vz_ray.config.eval_run import EvalRunConfig

        return EvalRunConfig
    if command == "quickstart":
        from vz_ray.config.quickstart import QuickstartConfig

        return QuickstartConfig
    if command == "ablate":
        from vz_ray.config.ablation import AblationConfig

        return AblationConfig
    raise UserError(f"{command!r} is no job; it is one of {', '.join(COMMANDS)}")


COMMANDS = ("train", "sft", "eval", "quickstart", "ablate")
DEFAULT_CONFIGS = {"quickstart": "conf/quickstart.yaml", "ablate": "conf/ablation.yaml"}


@dataclass(frozen=True, slots=True)
class JobCommand:
    """A command and its arguments, read.

    Attributes:
        command: One of `COMMANDS`.
        arguments: A config file and overrides, as given.
        config: What they say.
    """

    command: str
    arguments: Sequence[str]
    config: ClusterConfig

    @classmethod
    def parse(cls, given: Sequence[str]) -> JobCommand:
        """From `[train] conf/x.yaml key=value ...`; the command is `train` if it is left out.

        Raises:
            UserError: A wrong key or value, or no such command.
        """
        first = given[0] if given else ""
        named = bool(first) and "=" not in first and not first.endswith((".yaml", ".yml"))
        command, arguments = (first, list(given[1:])) if named else ("train", list(given))
        schema = config_class(command)
        files = [one for one in arguments if one.endswith((".yaml", ".yml")) and "=" not in one]
        if len(files) > 1:
            raise UserError(
                f"two config files were given, {files[0]} and {files[1]}: one may extend the other"
            )
        overrides = [one for one in arguments if one not in files]
        config = load_config(schema, files[0] if files else DEFAULT_CONFIGS.get(command), overrides)
        return cls(command, arguments, config)


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """How a job is sent.

    Attributes:
        address: Of the job API; empty takes Ray's variables.
        working_dir: What goes along.
        exclude: Patterns of what stays.
        limit_mib: Most that may go along.
        env_vars: Environment of the job, `NAME=VALUE`.
        grace_s: Between asking it to stop and killing it.
        allow_version_mismatch: Put up with another Ray version.
        follow: Show what it prints until it ends.
    """

    address: str = ""
    working_dir: Path = Path(".")
    exclude: Sequence[str] = ()
    limit_mib: float = 100.0
    env_vars: Mapping[str, str] = field(default_factory=dict)
    grace_s: int = 600
    allow_version_mismatch: bool = False
    follow: bool = True


def run_submit(wanted: JobCommand, how: SubmitOptions, *, check_only: bool) -> int:
    """Sends a run to a cluster, and follows it; with `check_only`, a job that looks whether it would fit.

    Returns:
        The exit status: the job's own, 0 where it is not followed.

    Raises:
        UserError: Something is wrong that can be known here, or the cluster refuses.
    """
    runs = getattr(wanted.config, "runs", "")
    if not Path(runs).is_absolute():
        raise UserError(
            f"runs is {runs!r}, which would be in the job's own directory and go with it: give an absolute "
            "path on a volume that every node of the cluster sees, runs=/shared/runs"
        )
    console = Console(highlight=False)
    package = package_working_dir(how.working_dir, exclude=how.exclude, limit_mib=how.limit_mib)
    client = JobClient(resolve_address(how.address), allow_version_mismatch=how.allow_version_mismatch)
    console.print(f"cluster  {client.address}, Ray {client.ray_version}")
    console.print(
        f"sending  {len(package.files)} files, {package.total_bytes / MIB:.1f} MiB, from {package.root.resolve()}"
    )
    command = ["preflight", wanted.command] if check_only else [wanted.command]
    name = f"{wanted.config.name}-{CHECK_SUFFIX}" if check_only else str(wanted.config.name)
    job = JobSpec(name, command[0], [*command[1:], *wanted.arguments], how.env_vars, how.grace_s)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "working_dir.zip"
        package.write(packed)
        id, new = submit_job(client, job, packed)
    console.print(f"job      {id} {'is started' if new else 'is under way already'}: {job.entrypoint}")
    if not how.follow and not check_only:
        console.print(f"         `vz-ray submit --attach {id}` follows it, `--stop {id}` stops it")
        return 0
    return run_attach(client, id, console)


def run_attach(client: JobClient, id: str, console: Console) -> int:
    """Follows a job to its end; Ctrl-C leaves it running."""

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = asyncio.run(follow_job(client, id, show))
    except KeyboardInterrupt:
        console.print(
            f"\nthe job {id} goes on: `vz-ray submit --attach {id}` follows it again, `--stop {id}` stops it"
        )
        return 0
    console.print(f"job      {job.id} {_fate(job)}")
    if job.status == "SUCCEEDED":
        return 0
    return 130 if job.status == "STOPPED" else job.exit_code or 1


def _fate(job: JobInfo) -> str:
    took = f" after {format_duration((job.ended_ms - job.started_ms) / 1000)}" if job.ended_ms else ""
    if job.status == "FAILED" and job.exit_code is None:
        return f"has failed{took}: {(job.message.strip() or 'no reason is known').splitlines()[0]}"
    words = {"SUCCEEDED": "is done", "STOPPED": "was stopped", "FAILED": f"ended with status {job.exit_code}"}
    return words.get(job.status, job.status.lower()) + took


def run_stop(name: str, how: SubmitOptions) -> None:
    """Stops a job, by its id or its run's name; its checkpoint is written before this returns."""
    client = JobClient(resolve_address(how.address), allow_version_mismatch=True)
    job = find_job(client, name)
    if job.finished:
        print(f"the job {job.id} {_fate(job)} before")
        return
    print(f"asking {job.id} to stop; it has {how.grace_s} s for its checkpoint")
    print(f"the job {job.id} {_fate(stop_job(client, job, how.grace_s + _STOP_SLACK_S))}")


def list_jobs(how: SubmitOptions) -> None:
    """Prints the jobs of a cluster."""
    client = JobClient(resolve_address(how.address), allow_version_mismatch=True)
    drawn = Table(box=None, pad_edge=False)
    for heading in ("job", "run", "status", "began", "took"):
        drawn.add_column(heading)
    for job in client.list_jobs():
        began = (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started_ms / 1000)) if job.started_ms else ""
        )
        end = job.ended_ms / 1000 if job.ended_ms else time.time()
        took = format_duration(end - job.started_ms / 1000) if job.started_ms else ""
        drawn.add_row(job.id, job.run, job.status.lower(), began, took)
    Console().print(drawn)
