"""A run as a job: sent under the run's name, found again by it, followed, stopped.

run `long`   job `long`      stopped
             job `long-2`    goes on from the checkpoints of `long`
"""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from vz_ray.jobs.job_client import JobClient, JobInfo
from vz_ray.utils.errors import UserError

STOP_GRACE_ENV_VAR = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's: between asking a job to stop and killing it. It counts where the job's own process is started,
so that a job may bring it along."""
_POLL_S = 1.0
_AGAIN_S = 2.0
"""Before a connection that broke is opened again."""
_ASK_S = 30.0
"""Silence after which a job is asked whether it still runs."""
_SILENT_S = 300.0
"""Silence after which the connection is opened anew."""
_BREAKS = 30
"""Connections in a row that may break without a word."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What is to be run.

    Attributes:
        run: Name of the run; attempts at it are numbered.
        command: Of `vz-ray`: `train`, `sft`, ...
        arguments: A config file and overrides.
        env_vars: Environment of the job and its actors.
        grace_s: Between asking it to stop and killing it.
    """

    run: str
    command: str
    arguments: Sequence[str]
    env_vars: Mapping[str, str] = field(default_factory=dict)
    grace_s: int = 600

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.run):
            raise UserError(
                f"name is {self.run!r}; jobs are called by it: use letters, digits, '_', '.' and '-'"
            )

    @property
    def entrypoint(self) -> str:
        """The job's command line; it replaces the shell, so that a stop reaches the run itself."""
        words = ["python", "-m", "vz_ray.cli", self.command, *self.arguments]
        if not any(word.startswith("ray.address=") for word in words):
            words.append("ray.address=auto")
        return f"exec {shlex.join(words)}"

    @property
    def environment(self) -> dict[str, str]:
        return {STOP_GRACE_ENV_VAR: str(self.grace_s), **self.env_vars}


def attempts_of_run(jobs: Sequence[JobInfo], run: str) -> list[JobInfo]:
    """The jobs that were attempts at a run, oldest first."""
    return [job for job in jobs if job.run == run]


def next_job_id(jobs: Sequence[JobInfo], run: str) -> str:
    """What the next attempt at a run is called: `run`, `run-2`, `run-3`; ids are never used twice."""
    taken = {job.id for job in jobs}
    number, found = 1, run
    while found in taken:
        number += 1
        found = f"{run}-{number}"
    return found


def submit_job(client: JobClient, wanted: JobSpec, working_dir: Path) -> tuple[str, bool]:
    """Starts the next attempt at a run, or finds the one that is under way.

    Returns:
        The job's id, and whether it was started by this call.

    Raises:
        UserError: An attempt with another command is under way.
    """
    jobs = client.list_jobs()
    under_way = [job for job in attempts_of_run(jobs, wanted.run) if not job.finished]
    if under_way:
        job = under_way[-1]
        if job.entrypoint != wanted.entrypoint:
            raise UserError(
                f"the run {wanted.run} is under way as job {job.id} with another command ({job.entrypoint}): "
                f"stop it with `vz-ray submit --stop {wanted.run}`, or choose another name=..."
            )
        return job.id, False
    id = next_job_id(jobs, wanted.run)
    client.submit(id, wanted.entrypoint, run=wanted.run, working_dir=working_dir, env_vars=wanted.environment)
    return id, True


def find_job(client: JobClient, name: str) -> JobInfo:
    """The newest attempt at the run of this name, or the job of this id.

    Raises:
        UserError: There is none; names those that there are.
    """
    jobs = client.list_jobs()
    found = attempts_of_run(jobs, name)[-1:] or [job for job in jobs if job.id == name]
    if not found:
        runs = sorted({job.run or job.id for job in jobs})
        raise UserError(
            f"{client.address} knows no job or run {name!r}; "
            + (f"it knows {', '.join(runs)}" if runs else "it has had no job yet")
        )
    return found[0]


async def follow_job(client: JobClient, id: str, show: Callable[[str], None]) -> JobInfo:
    """Shows what a job prints until it ends, through connections that break or fall silent.

    Raises:
        UserError: The cluster could not be reached too often in a row.
    """
    shown, breaks = 0, 0
    while True:
        at = 0
        try:
            async with aclosing(_spoken(client, id)) as spoken:
                async for lines in spoken:
                    fresh = lines[max(0, shown - at) :]
                    at += len(lines)
                    if fresh:
                        show(fresh)
                        shown, breaks = max(shown, at), 0
            job = await asyncio.to_thread(client.get_job, id)
            if job.finished:
                return job
            await asyncio.sleep(_POLL_S)
        except Exception as error:  # aiohttp's own, Ray's, and those of the sockets below
            breaks += 1
            if breaks > _BREAKS:
                raise UserError(
                    f"{client.address} could not be reached {breaks} times in a row ({error}); the job goes "
                    f"on: `vz-ray submit --attach {id}` follows it again"
                ) from error
            await asyncio.sleep(_AGAIN_S)


async def _spoken(client: JobClient, id: str) -> AsyncGenerator[str]:
    """What a job prints; ends with it, and after a long silence, in which the connection may have died."""
    tail = aiter(client.tail_logs(id))
    silent_s = 0.0
    coming: asyncio.Future[str] = asyncio.ensure_future(anext(tail))
    try:
        while silent_s < _SILENT_S:
            done, _ = await asyncio.wait({coming}, timeout=_ASK_S)
            if done:
                yield coming.result()
                silent_s, coming = 0.0, asyncio.ensure_future(anext(tail))
                continue
            silent_s += _ASK_S
            if (await asyncio.to_thread(client.get_job, id)).finished:
                return
    except StopAsyncIteration:
        return
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


def stop_job(client: JobClient, job: JobInfo, seconds: float) -> JobInfo:
    """Asks a job to stop, and waits until it has.

    Raises:
        UserError: It has not within `seconds`.
    """
    if job.finished:
        return job
    client.stop(job.id)
    until = time.monotonic() + seconds
    while not (job := client.get_job(job.id)).finished:
        if time.monotonic() > until:
            raise UserError(
                f"the job {job.id} was asked to stop and runs on after {seconds:g} s: it writes its "
                "checkpoint, or hangs; look at its log, or try again"
            )
        time.sleep(_POLL_S)
    return job
