"""Jobs under a run's name: submit, find, follow, stop.

run `long`   job `long`      stopped
             job `long-2`    resumes from the checkpoints of `long`
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
"""Ray's grace period between the request to stop a job and its kill. Ray reads it from the job's environment."""
_POLL_INTERVAL_S = 1.0
_RECONNECT_DELAY_S = 2.0
_STATUS_CHECK_S = 30.0
"""Time without output after which the job's status is queried."""
_RECONNECT_AFTER_S = 300.0
"""Time without output after which the connection is reopened."""
_MAX_BROKEN_CONNECTIONS = 30
"""Maximum number of consecutive broken connections without output."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Job to submit.

    Attributes:
        run: Name of the run; its attempts are numbered.
        command: Subcommand of `vz-ray`: `train`, `sft`, ...
        arguments: Config file and overrides.
        env_vars: Environment variables of the job and its actors.
        grace_s: Grace period between the request to stop and the kill.
    """

    run: str
    command: str
    arguments: Sequence[str]
    env_vars: Mapping[str, str] = field(default_factory=dict)
    grace_s: int = 600

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.run):
            raise UserError(f"name is {self.run!r}, which is used as a job id; use letters, digits, '_', '.' and '-'")

    @property
    def entrypoint(self) -> str:
        """Command line of the job. `exec` replaces the shell, so a stop signal reaches the run itself."""
        command = ["python", "-m", "vz_ray.cli", self.command, *self.arguments]
        if not any(argument.startswith("ray.address=") for argument in command):
            command.append("ray.address=auto")
        return f"exec {shlex.join(command)}"

    @property
    def environment(self) -> dict[str, str]:
        return {STOP_GRACE_ENV_VAR: str(self.grace_s), **self.env_vars}


def attempts_of_run(jobs: Sequence[JobInfo], run: str) -> list[JobInfo]:
    """Return the jobs of a run, oldest first."""
    return [job for job in jobs if job.run == run]


def next_job_id(jobs: Sequence[JobInfo], run: str) -> str:
    """Return the id of the next attempt: `run`, `run-2`, `run-3`, ...; ids are never reused."""
    used_ids = {job.id for job in jobs}
    number, job_id = 1, run
    while job_id in used_ids:
        number += 1
        job_id = f"{run}-{number}"
    return job_id


def submit_job(client: JobClient, spec: JobSpec, working_dir: Path) -> tuple[str, bool]:
    """Start the next attempt of a run, or return the one that is running.

    Returns:
        The job id, and True if this call started the job.

    Raises:
        UserError: An attempt with another command is running.
    """
    jobs = client.list_jobs()
    running = [job for job in attempts_of_run(jobs, spec.run) if not job.finished]
    if running:
        job = running[-1]
        if job.entrypoint != spec.entrypoint:
            raise UserError(
                f"run {spec.run} is already running as job {job.id} with another command ({job.entrypoint}); "
                f"stop it with `vz-ray submit --stop {spec.run}`, or use another name=..."
            )
        return job.id, False
    job_id = next_job_id(jobs, spec.run)
    client.submit(job_id, spec.entrypoint, run=spec.run, working_dir=working_dir, env_vars=spec.environment)
    return job_id, True


def find_job(client: JobClient, name: str) -> JobInfo:
    """Return the newest attempt of a run, or the job with this id.

    Raises:
        UserError: The job does not exist. The error lists the existing jobs.
    """
    jobs = client.list_jobs()
    matches = attempts_of_run(jobs, name)[-1:] or [job for job in jobs if job.id == name]
    if not matches:
        runs = sorted({job.run or job.id for job in jobs})
        raise UserError(f"{client.address} has no job or run {name!r}; existing: {', '.join(runs) or 'no jobs yet'}")
    return matches[0]


async def follow_job(client: JobClient, id: str, on_output: Callable[[str], None]) -> JobInfo:
    """Pass the job's output to `on_output` until the job ends. Reconnects after broken or silent connections.

    Raises:
        UserError: Too many consecutive connections failed.
    """
    shown_chars, failures = 0, 0
    while True:
        received_chars = 0
        try:
            async with aclosing(_stream_output(client, id)) as stream:
                async for text in stream:
                    new_text = text[max(0, shown_chars - received_chars) :]
                    received_chars += len(text)
                    if new_text:
                        on_output(new_text)
                        shown_chars, failures = max(shown_chars, received_chars), 0
            job = await asyncio.to_thread(client.get_job, id)
            if job.finished:
                return job
            await asyncio.sleep(_POLL_INTERVAL_S)
        except Exception as error:  # errors of aiohttp, Ray and sockets have no common base class
            failures += 1
            if failures > _MAX_BROKEN_CONNECTIONS:
                raise UserError(
                    f"no connection to {client.address} in {failures} consecutive attempts ({error}); the job is "
                    f"still running, follow it with `vz-ray submit --attach {id}`"
                ) from error
            await asyncio.sleep(_RECONNECT_DELAY_S)


async def _stream_output(client: JobClient, id: str) -> AsyncGenerator[str]:
    """Yield the job's output until the job ends, or until the connection may be dead."""
    tail = aiter(client.tail_logs(id))
    silent_s = 0.0
    next_text: asyncio.Future[str] = asyncio.ensure_future(anext(tail))
    try:
        while silent_s < _RECONNECT_AFTER_S:
            done, _ = await asyncio.wait({next_text}, timeout=_STATUS_CHECK_S)
            if done:
                yield next_text.result()
                silent_s, next_text = 0.0, asyncio.ensure_future(anext(tail))
                continue
            silent_s += _STATUS_CHECK_S
            if (await asyncio.to_thread(client.get_job, id)).finished:
                return
    except StopAsyncIteration:
        return
    finally:
        next_text.cancel()
        await asyncio.gather(next_text, return_exceptions=True)


def stop_job(client: JobClient, job: JobInfo, timeout_s: float) -> JobInfo:
    """Stop a job and wait until it has ended.

    Raises:
        UserError: The job is still running after `timeout_s`.
    """
    if job.finished:
        return job
    client.stop(job.id)
    end_time = time.monotonic() + timeout_s
    while not (job := client.get_job(job.id)).finished:
        if time.monotonic() > end_time:
            raise UserError(
                f"job {job.id} is still running {timeout_s:g} s after the request to stop; it is writing its "
                "checkpoint or hanging. Check its log, or retry"
            )
        time.sleep(_POLL_INTERVAL_S)
    return job
