"""What pods do before Kubernetes ends them; the preStop hooks of k8s/ call it.

    python -m cluster.hooks stop-jobs --seconds 630       # head: jobs are asked to stop, and waited for
    python -m cluster.hooks wait-for-jobs --seconds 630   # learner: stays while a job is running
    python -m cluster.hooks wait-idle --seconds 90        # rollout, decoders: stays while actors work here

A hook that returns is followed by SIGTERM, which ends Ray at once; one that takes longer than the pod's grace
period is cut off. So each waits for what it is there for, for a time that the grace period covers, and never
fails.
It uses the standard library alone: a pod that is being ended has no time for more.
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
"""How long the dashboard may take to answer."""
UNREACHABLE_TIMEOUT_S = 15.0
"""A dashboard that has not answered for as long is gone, and its jobs with it."""
SYSTEM_PROCESSES = ("IDLE", "ProxyActor", "ServeController", "SPILL", "RESTORE")
"""What Ray calls processes that live as long as their node."""


class JobApi:
    """Ray's job API on the head of this pod's cluster.

    Args:
        address: Such as `http://10.0.0.7:8265`.
        token: Of the cluster; empty where it asks for none.
    """

    def __init__(self, address: str, token: str = "") -> None:
        self._address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def running_jobs(self) -> list[str]:
        """Ids of submitted jobs that have not ended.

        Raises:
            OSError: Nobody answers, or with an error.
        """
        jobs = self._ask("GET", "/api/jobs/")
        alive = [job for job in jobs if job.get("status") in ("PENDING", "RUNNING")]
        return [str(job["submission_id"]) for job in alive if job.get("submission_id")]

    def stop_job(self, job: str) -> None:
        """Asks a job to stop, which it does in its own time."""
        self._ask("POST", f"/api/jobs/{job}/stop")

    def _ask(self, method: str, path: str) -> Any:
        request = Request(self._address + path, method=method, headers=self._headers)
        with urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
            try:
                return json.loads(answer.read() or b"null")
            except ValueError as error:
                raise URLError(f"{path} answered what is not JSON") from error


def stop_jobs(job_api: JobApi, timeout_s: float, poll_interval_s: float = 2.0) -> str:
    """Asks all jobs to stop, those too that begin meanwhile, and waits until none is left.

    Returns:
        How it ended, as a sentence.
    """
    asked: set[str] = set()

    def left() -> list[str]:
        jobs = job_api.running_jobs()
        for job in jobs:
            if job not in asked:
                job_api.stop_job(job)
                asked.add(job)
        return jobs

    return _wait(left, timeout_s, poll_interval_s, "jobs")


def wait_for_jobs(job_api: JobApi, timeout_s: float, poll_interval_s: float = 2.0) -> str:
    """Waits until no job is left; a head that is gone has none."""
    return _wait(job_api.running_jobs, timeout_s, poll_interval_s, "jobs")


def wait_idle(
    timeout_s: float, poll_interval_s: float = 1.0, commands: Callable[[], Iterator[str]] | None = None
) -> str:
    """Waits until no actor is left in this pod."""
    return _wait(lambda: running_actors(commands or process_commands), timeout_s, poll_interval_s, "actors")


def running_actors(commands: Callable[[], Iterator[str]]) -> list[str]:
    """Ray's actors and tasks among processes, by the names that Ray gives them.

    Example: `["ray::RayWorker", "ray::IDLE", "python"]` -> `["RayWorker"]`
    """
    named = [command.removeprefix("ray::") for command in commands() if command.startswith("ray::")]
    return [name for name in named if not name.startswith(SYSTEM_PROCESSES)]


def process_commands() -> Iterator[str]:
    """The command line of each process of this pod."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # it has ended


def _wait(left: Callable[[], Sequence[str]], seconds: float, every_s: float, what: str) -> str:
    """Asks what is left until nothing is, nobody answers, or the time is over."""
    begun = heard = time.monotonic()
    names: Sequence[str] = ()
    while (now := time.monotonic()) - begun < seconds:
        try:
            names, heard = left(), now
            if not names:
                return f"no {what} left after {now - begun:.0f} s"
        except OSError as error:
            if now - heard >= min(UNREACHABLE_TIMEOUT_S, seconds):
                return f"nobody has answered for {now - heard:.0f} s: {error}"
        time.sleep(min(every_s, max(0.0, begun + seconds - time.monotonic())))
    return f"{', '.join(names) or what} not done after {seconds:g} s"


def parser() -> argparse.ArgumentParser:
    """What the command line may say."""
    parser = argparse.ArgumentParser(prog="python -m cluster.hooks", description="Before a pod ends.")
    parser.add_argument("hook", choices=["stop-jobs", "wait-for-jobs", "wait-idle"])
    parser.add_argument("--seconds", type=float, required=True, help="Longest wait.")
    head = os.environ.get("FQ_RAY_IP", "127.0.0.1")
    parser.add_argument("--dashboard", default=f"http://{head}:8265", help="The head's dashboard.")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a hook; always 0, as Kubernetes would only report another status, and end the pod all the same."""
    given = parser().parse_args(arguments)
    server = JobApi(given.dashboard, os.environ.get("RAY_AUTH_TOKEN", ""))
    match given.hook:
        case "stop-jobs":
            ended = stop_jobs(server, given.seconds)
        case "wait-for-jobs":
            ended = wait_for_jobs(server, given.seconds)
        case _:
            ended = wait_idle(given.seconds)
    print(f"{given.hook}: {ended}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
