"""preStop hooks of the pods in k8s/.

    python -m cluster.hooks stop-jobs --seconds 630       # head: request a stop of all jobs and wait
    python -m cluster.hooks wait-idle --seconds 630       # learner, rollout, decoders: wait until no actor runs here

Only the head has a network that can be relied on: deleting a RayCluster deletes the name of its head first.

Kubernetes sends SIGTERM after the hook, which ends Ray immediately, and kills the hook after the grace period.
Each hook therefore waits for a time within the grace period, and never fails. The module uses only the standard
library, so it starts quickly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

REQUEST_TIMEOUT_S = 5.0
"""Timeout of a request to the dashboard."""
UNREACHABLE_TIMEOUT_S = 15.0
"""A dashboard that does not answer for this long is considered dead, with its jobs."""
SYSTEM_PROCESSES = ("IDLE", "ProxyActor", "ServeController", "SPILL", "RESTORE")
"""Names of Ray processes that live as long as their node."""


class JobApi:
    """Client of the job API on the head of this cluster.

    Args:
        address: Address such as `http://10.0.0.7:8265`.
        token: Token of the cluster; empty without authentication.
    """

    def __init__(self, address: str, token: str = "") -> None:
        self._address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def running_jobs(self) -> list[str]:
        """Return the ids of submitted jobs that have not ended.

        Raises:
            OSError: The server does not answer, or returns an error.
        """
        jobs = self._request("GET", "/api/jobs/")
        alive = [job for job in jobs if job.get("status") in ("PENDING", "RUNNING")]
        return [str(job["submission_id"]) for job in alive if job.get("submission_id")]

    def stop_job(self, job: str) -> None:
        """Request a stop of a job. The job stops asynchronously."""
        self._request("POST", f"/api/jobs/{job}/stop")

    def _request(self, method: str, path: str) -> Any:
        request = Request(self._address + path, method=method, headers=self._headers)
        with urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            try:
                return json.loads(response.read() or b"null")
            except ValueError as error:
                raise URLError(f"{path} returned invalid JSON") from error


def stop_jobs(job_api: JobApi, timeout_s: float, poll_interval_s: float = 2.0) -> str:
    """Request a stop of all jobs, including new ones, and wait until all have ended.

    Returns:
        The outcome as a sentence.
    """
    stopping: set[str] = set()

    def running_jobs() -> list[str]:
        jobs = job_api.running_jobs()
        for job in jobs:
            if job not in stopping:
                job_api.stop_job(job)
                stopping.add(job)
        return jobs

    return _wait(running_jobs, timeout_s, poll_interval_s, "jobs")


def wait_idle(
    timeout_s: float, poll_interval_s: float = 1.0, commands: Callable[[], Iterator[str]] | None = None
) -> str:
    """Wait until no actor runs in this pod."""
    return _wait(lambda: running_actors(commands or process_commands), timeout_s, poll_interval_s, "actors")


def running_actors(commands: Callable[[], Iterator[str]]) -> list[str]:
    """Return the names of Ray actors and tasks among the process command lines.

    Example: `["ray::RayWorker", "ray::IDLE", "python"]` -> `["RayWorker"]`
    """
    named = [command.removeprefix("ray::") for command in commands() if command.startswith("ray::")]
    return [name for name in named if not name.startswith(SYSTEM_PROCESSES)]


def process_commands() -> Iterator[str]:
    """Yield the command line of each process in this pod."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # the process has ended


def _wait(list_remaining: Callable[[], Sequence[str]], seconds: float, every_s: float, kind: str) -> str:
    """Poll until nothing remains, the server is unreachable, or the timeout expires."""
    start = last_answer = time.monotonic()
    names: Sequence[str] = ()
    while (now := time.monotonic()) - start < seconds:
        try:
            names, last_answer = list_remaining(), now
            if not names:
                return f"all {kind} ended after {now - start:.0f} s"
        except OSError as error:
            if now - last_answer >= min(UNREACHABLE_TIMEOUT_S, seconds):
                return f"no answer for {now - last_answer:.0f} s: {error}"
        time.sleep(min(every_s, max(0.0, start + seconds - time.monotonic())))
    return f"{', '.join(names) or kind} still running after {seconds:g} s"


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(prog="python -m cluster.hooks", description="preStop hooks of pods.")
    parser.add_argument("hook", choices=["stop-jobs", "wait-idle"])
    parser.add_argument("--seconds", type=float, required=True, help="Maximum wait.")
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265", help="The dashboard, for stop-jobs.")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a hook; always return 0, because Kubernetes ends the pod in any case."""
    options = parser().parse_args(arguments)
    if options.hook == "stop-jobs":
        outcome = stop_jobs(JobApi(options.dashboard, os.environ.get("RAY_AUTH_TOKEN", "")), options.seconds)
    else:
        outcome = wait_idle(options.seconds)
    print(f"{options.hook}: {outcome}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
