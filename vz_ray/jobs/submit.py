"""Body of `vz-ray submit`: validate a run, upload the working directory, start, follow and stop its job."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vz_ray.config.ablation import AblationConfig
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.load import is_config_file, load_config, split_arguments
from vz_ray.config.quickstart import QuickstartConfig, quickstart_file
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.job_client import JobClient, JobInfo, resolve_address
from vz_ray.jobs.job_lifecycle import JobSpec, find_job, follow_job, stop_job, submit_job
from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.jobs.working_dir import MIB, WorkingDirPackage, package_working_dir
from vz_ray.utils.durations import format_duration
from vz_ray.utils.errors import UserError
from vz_ray.utils.resources import find_shipped

CHECK_SUFFIX = "check"
"""Suffix of the run name for jobs that only run the pre-flight checks."""
_STOP_SLACK_S = 60.0
"""Added to the grace period when waiting for a job to stop."""


CONFIG_CLASSES: dict[str, type[ClusterConfig]] = {
    "train": GrpoRunConfig,
    "sft": SftRunConfig,
    "eval": EvalRunConfig,
    "quickstart": QuickstartConfig,
    "ablate": AblationConfig,
}
"""Config class of each command that can run as a job."""
DEFAULT_CONFIGS: Mapping[str, Callable[[Sequence[str]], str]] = {
    "quickstart": quickstart_file,
    "ablate": lambda overrides: "conf/ablation.yaml",
}
"""Config file of a command whose arguments name none, a function of the overrides."""


@dataclass(frozen=True, slots=True)
class JobCommand:
    """A parsed command line.

    Attributes:
        command: One of `CONFIG_CLASSES`.
        arguments: Config file and overrides, unchanged.
        config: The loaded config.
    """

    command: str
    arguments: Sequence[str]
    config: ClusterConfig

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> JobCommand:
        """Parse `[train] conf/x.yaml key=value ...`; the default command is `train`.

        Raises:
            UserError: The command, a key or a value is invalid.
        """
        first = arguments[0] if arguments else ""
        has_command = bool(first) and "=" not in first and not is_config_file(first)
        command, arguments = (first, arguments[1:]) if has_command else ("train", arguments)
        if command not in CONFIG_CLASSES:
            raise UserError(f"{command!r} cannot run as a job; use one of {', '.join(CONFIG_CLASSES)}")
        file, overrides = split_arguments(arguments)
        if file is None and command in DEFAULT_CONFIGS:
            file = DEFAULT_CONFIGS[command](overrides)
        config = load_config(CONFIG_CLASSES[command], file, overrides)
        return cls(command, arguments, config)


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Options of a submission.

    Attributes:
        address: Address of the job API; empty uses Ray's environment variables.
        working_dir: Directory to upload.
        exclude: Patterns of files to exclude.
        limit_mib: Maximum size of the upload.
        env_vars: Environment variables of the job.
        grace_s: Grace period between the request to stop and the kill.
        allow_version_mismatch: Accept a cluster with another Ray version.
        follow: Print the job's output until it ends.
    """

    address: str = ""
    working_dir: Path = Path(".")
    exclude: Sequence[str] = ()
    limit_mib: float = 100.0
    env_vars: Mapping[str, str] = field(default_factory=dict)
    grace_s: int = 600
    allow_version_mismatch: bool = False
    follow: bool = True


def run_submit(command: JobCommand, options: SubmitOptions, *, check_only: bool) -> int:
    """Submit a run to a cluster and follow it. `check_only` submits only its pre-flight checks.

    Returns:
        Exit status of the job; 0 if it is not followed.

    Raises:
        UserError: The config is invalid for a job, or the cluster rejects the job.
    """
    runs = getattr(command.config, "runs", "")
    if not Path(runs).is_absolute():
        raise UserError(
            f"runs is {runs!r}, a relative path in the job's working directory, which is deleted with the job; "
            "set an absolute path on a volume of all nodes: runs=/shared/runs"
        )
    console = Console(highlight=False)
    package = package_working_dir(options.working_dir, exclude=options.exclude, limit_mib=options.limit_mib)
    if not check_only:
        check_input_paths(command.config, package)
    client = JobClient(resolve_address(options.address), allow_version_mismatch=options.allow_version_mismatch)
    console.print(f"cluster  {client.address}, Ray {client.ray_version}")
    size_mib = package.total_bytes / MIB
    console.print(f"upload   {len(package.files)} files, {size_mib:.1f} MiB, from {package.root.resolve()}")
    subcommand = ["preflight", command.command] if check_only else [command.command]
    name = f"{command.config.name}-{CHECK_SUFFIX}" if check_only else str(command.config.name)
    spec = JobSpec(name, subcommand[0], [*subcommand[1:], *command.arguments], options.env_vars, options.grace_s)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "working_dir.zip"
        package.write(archive)
        job_id, is_new = submit_job(client, spec, archive)
    console.print(f"job      {job_id} {'started' if is_new else 'is already running'}: {spec.entrypoint}")
    if not options.follow and not check_only:
        console.print(f"         follow it with `vz-ray submit --attach {job_id}`, stop it with `--stop {job_id}`")
        return 0
    return run_attach(client, job_id, console)


def check_input_paths(config: ClusterConfig, package: WorkingDirPackage) -> None:
    """Raise if a relative path of the model or the data is not part of the upload.

    Raises:
        UserError: The job would not find the path; the error names its key and the reason.
    """
    for key, path in input_paths(config).items():
        if not path or Path(path).is_absolute() or package.contains(path) or find_shipped(path):
            continue
        exists = (package.root / path).exists()
        reason = "git ignores it or a pattern excludes it" if exists else f"it does not exist in {package.root}"
        raise UserError(
            f"{key} is {path!r}, a relative path in the job's working directory, but it is not uploaded: {reason}. Set "
            f"an absolute path on a volume of all nodes: {key}=/shared/{Path(path).name}"
        )


def input_paths(config: ClusterConfig) -> dict[str, str]:
    """Return the files and folders that a run reads, by config key; a quickstart and an ablation make their data."""
    paths = {"model": str(config.model or "")}
    if isinstance(config, QuickstartConfig | AblationConfig):
        return paths
    if isinstance(config, GrpoRunConfig):
        paths["data.train"] = config.data.train
        if config.train.validate_every:
            paths["data.validation"] = config.data.validation
    elif isinstance(config, SftRunConfig):
        paths["data"] = config.data
    elif isinstance(config, EvalRunConfig):
        paths |= {f"compare.{label}": path for label, path in config.compare.items()}
        for name, benchmark in config.benchmarks.items():
            key = "data" if config.data else f"benchmarks.{name}.annotations"
            paths[key] = config.data or benchmark.annotations
    return paths


def run_attach(client: JobClient, id: str, console: Console) -> int:
    """Print a job's output until it ends. Ctrl-C leaves the job running.

    Returns:
        Exit status of the job.
    """

    def print_output(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = asyncio.run(follow_job(client, id, print_output))
    except KeyboardInterrupt:
        console.print(
            f"\njob {id} is still running: follow it with `vz-ray submit --attach {id}`, stop it with `--stop {id}`"
        )
        return 0
    console.print(f"job      {job.id} {describe_outcome(job)}")
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 130
    code = job.exit_code or 1
    return code if code > 0 else 128 - code  # as a shell reports a signal


def describe_outcome(job: JobInfo) -> str:
    """Return how a job ended, as the end of a sentence."""
    duration = f" after {format_duration((job.ended_ms - job.started_ms) / 1000)}" if job.ended_ms else ""
    if job.status == "FAILED" and job.exit_code is None:
        return f"failed{duration}: {(job.message.strip() or 'no reason given').splitlines()[0]}"
    failure = f"exited with {job.exit_code}"
    if (job.exit_code or 0) < 0:
        number = -(job.exit_code or 0)
        failure = f"was killed by {next((item.name for item in signal.Signals if item == number), f'signal {number}')}"
        if job.exit_code == -signal.SIGKILL:
            failure += ", probably because its node ran out of memory,"
    outcomes = {"SUCCEEDED": "succeeded", "STOPPED": "stopped", "FAILED": failure}
    return outcomes.get(job.status, job.status.lower()) + duration


def run_stop(name: str, options: SubmitOptions) -> int:
    """Stop a job, given its id or its run's name, and print what it saved. Returns after the job has ended.

    Returns:
        0 if the job ended by itself; 1 if it was killed before it had saved its last completed step.
    """
    client = JobClient(resolve_address(options.address), allow_version_mismatch=True)
    job = find_job(client, name)
    if job.finished:
        print(f"job {job.id} has already ended: {describe_outcome(job)}")
        return 0
    print(f"stopping job {job.id}; it has {options.grace_s} s to write its checkpoint")
    job = stop_job(client, job, options.grace_s + _STOP_SLACK_S)
    print(f"job {job.id} {describe_outcome(job)}")
    if job.status == "SUCCEEDED":
        return 0
    if message := find_stop_message(client.read_logs(job.id)):
        print(message)
        return 0
    print(
        f"the run did not report what it saved: it was killed or failed before. Its newest checkpoint is of an earlier "
        f"step (checkpoints/ in its run directory). Submit with a longer --grace-s than {options.grace_s} "
        "(`vz-ray plan` gives the time of a stop)"
    )
    return 1


def find_stop_message(output: str) -> str:
    """Return the last line of a job's output that reports a stop; empty without one."""
    lines = [line for line in output.splitlines() if line.startswith("vz-ray: stopped")]
    return lines[-1].removeprefix("vz-ray: ") if lines else ""


def list_jobs(options: SubmitOptions) -> None:
    """Print a table of the cluster's jobs."""
    client = JobClient(resolve_address(options.address), allow_version_mismatch=True)
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "run", "status", "started", "duration"):
        table.add_column(heading)
    for job in client.list_jobs():
        started = duration = ""
        if job.started_ms:
            started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started_ms / 1000))
            end_s = job.ended_ms / 1000 if job.ended_ms else time.time()
            duration = format_duration(end_s - job.started_ms / 1000)
        table.add_row(job.id, job.run, job.status.lower(), started, duration)
    Console().print(table)
