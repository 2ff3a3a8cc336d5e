"""`vz-ray submit` and `preflight`: a run on a cluster.

submit:     checked here, packed, sent to Ray's job API, followed
preflight:  on the cluster itself: would the run find room, are versions and volumes right
"""

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

from vz_ray.config import load
from vz_ray.jobs.client import Job, JobClient, address_of
from vz_ray.jobs.needs import ClusterConfig
from vz_ray.jobs.packing import MIB, gather
from vz_ray.jobs.submission import Submission, find, follow, stop, submit
from vz_ray.observe.checks import Check, problems, table
from vz_ray.observe.errors import UserError
from vz_ray.observe.spoken import duration

CHECK = "check"
"""Jobs that only look are called by the run's name and this."""
_STOP_SLACK_S = 60.0


def schema_of(command: str) -> type[Any]:
    """The config of a command that can be a job.

    Raises:
        UserError: It cannot.
    """
    if command == "train":
        from vz_ray.config.run import RunConfig

        return RunConfig
    if command == "sft":
        from vz_ray.config.sft import SftRunConfig

        return SftRunConfig
    if command == "eval":
        from vz_ray.config.benchmarks import BenchmarksConfig

        return BenchmarksConfig
    if command == "quickstart":
        from vz_ray.config.quickstart import QuickstartConfig

        return QuickstartConfig
    if command == "ablate":
        from vz_ray.config.ablate import AblateConfig

        return AblateConfig
    raise UserError(f"{command!r} is no job; it is one of {', '.join(COMMANDS)}")


COMMANDS = ("train", "sft", "eval", "quickstart", "ablate")
DEFAULTS = {"quickstart": "conf/quickstart.yaml", "ablate": "conf/ablate.yaml"}


@dataclass(frozen=True, slots=True)
class Wanted:
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
    def read(cls, given: Sequence[str]) -> Wanted:
        """From `[train] conf/x.yaml key=value ...`; the command is `train` if it is left out.

        Raises:
            UserError: A wrong key or value, or no such command.
        """
        first = given[0] if given else ""
        named = bool(first) and "=" not in first and not first.endswith((".yaml", ".yml"))
        command, arguments = (first, list(given[1:])) if named else ("train", list(given))
        schema = schema_of(command)
        files = [one for one in arguments if one.endswith((".yaml", ".yml")) and "=" not in one]
        if len(files) > 1:
            raise UserError(
                f"two config files were given, {files[0]} and {files[1]}: one may extend the other"
            )
        overrides = [one for one in arguments if one not in files]
        config = load(schema, files[0] if files else DEFAULTS.get(command), overrides)
        return cls(command, arguments, config)


@dataclass(frozen=True, slots=True)
class Sending:
    """How a job is sent.

    Attributes:
        address: Of the job API; empty takes Ray's variables.
        working_dir: What goes along.
        exclude: Patterns of what stays.
        limit_mib: Most that may go along.
        variables: Environment of the job, `NAME=VALUE`.
        grace_s: Between asking it to stop and killing it.
        any_ray: Put up with another Ray version.
        follow: Show what it prints until it ends.
    """

    address: str = ""
    working_dir: Path = Path(".")
    exclude: Sequence[str] = ()
    limit_mib: float = 100.0
    variables: Mapping[str, str] = field(default_factory=dict)
    grace_s: int = 600
    any_ray: bool = False
    follow: bool = True


def run_submit(wanted: Wanted, how: Sending, *, check_only: bool) -> int:
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
    package = gather(how.working_dir, exclude=how.exclude, limit_mib=how.limit_mib)
    client = JobClient(address_of(how.address), any_ray=how.any_ray)
    console.print(f"cluster  {client.address}, Ray {client.ray_version}")
    console.print(
        f"sending  {len(package.files)} files, {package.size / MIB:.1f} MiB, from {package.root.resolve()}"
    )
    command = ["preflight", wanted.command] if check_only else [wanted.command]
    name = f"{wanted.config.name}-{CHECK}" if check_only else str(wanted.config.name)
    job = Submission(name, command[0], [*command[1:], *wanted.arguments], how.variables, how.grace_s)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "working_dir.zip"
        package.write(packed)
        id, new = submit(client, job, packed)
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
        job = asyncio.run(follow(client, id, show))
    except KeyboardInterrupt:
        console.print(
            f"\nthe job {id} goes on: `vz-ray submit --attach {id}` follows it again, `--stop {id}` stops it"
        )
        return 0
    console.print(f"job      {job.id} {_fate(job)}")
    if job.status == "SUCCEEDED":
        return 0
    return 130 if job.status == "STOPPED" else job.exit_code or 1


def _fate(job: Job) -> str:
    took = f" after {duration((job.ended_ms - job.began_ms) / 1000)}" if job.ended_ms else ""
    if job.status == "FAILED" and job.exit_code is None:
        return f"has failed{took}: {(job.message.strip() or 'no reason is known').splitlines()[0]}"
    words = {"SUCCEEDED": "is done", "STOPPED": "was stopped", "FAILED": f"ended with status {job.exit_code}"}
    return words.get(job.status, job.status.lower()) + took


def run_stop(name: str, how: Sending) -> None:
    """Stops a job, by its id or its run's name; its checkpoint is written before this returns."""
    client = JobClient(address_of(how.address), any_ray=True)
    job = find(client, name)
    if job.over:
        print(f"the job {job.id} {_fate(job)} before")
        return
    print(f"asking {job.id} to stop; it has {how.grace_s} s for its checkpoint")
    print(f"the job {job.id} {_fate(stop(client, job, how.grace_s + _STOP_SLACK_S))}")


def run_jobs(how: Sending) -> None:
    """Prints the jobs of a cluster."""
    client = JobClient(address_of(how.address), any_ray=True)
    drawn = Table(box=None, pad_edge=False)
    for heading in ("job", "run", "status", "began", "took"):
        drawn.add_column(heading)
    for job in client.jobs():
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began_ms / 1000)) if job.began_ms else ""
        end = job.ended_ms / 1000 if job.ended_ms else time.time()
        took = duration(end - job.began_ms / 1000) if job.began_ms else ""
        drawn.add_row(job.id, job.run, job.status.lower(), began, took)
    Console().print(drawn)


def run_preflight(config: ClusterConfig) -> int:
    """Looks whether a run would fit on the cluster that this machine belongs to; prints what was found.

    Returns:
        1 if something would keep it from running, else 0.
    """
    checks = asyncio.run(_preflight(config))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(table(checks))
    return 1 if problems(checks) else 0


async def _preflight(config: ClusterConfig) -> list[Check]:
    from vz_ray import actors

    async with actors.ray_cluster(config.ray):
        return await actors.checks_of(config)
