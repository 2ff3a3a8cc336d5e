"""Hooks against a server with the responses of Ray's job API, and against real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import hooks
from cluster.hooks import JobApi, main, process_commands, running_actors, stop_jobs, wait_idle
from tests.cluster.manifests import ROOT
from vz_ray.k8s.manifest import Workload


@dataclass
class Jobs:
    """Jobs that need `takes_s` to stop; drivers of others are listed too, as by Ray."""

    token: str = "secret"
    takes_s: float = 0.3
    status: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)
    address: str = ""

    def listed(self) -> list[dict[str, object]]:
        for name, at in self.ends.items():
            if time.monotonic() >= at:
                self.status[name] = "STOPPED"
        jobs: list[dict[str, object]] = [{"submission_id": n, "status": s} for n, s in self.status.items()]
        return [*jobs, {"submission_id": None, "job_id": "01000000", "status": "RUNNING", "type": "DRIVER"}]

    def stop(self, name: str) -> None:
        self.stopped.append(name)
        self.ends[name] = time.monotonic() + self.takes_s


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    state = Jobs()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(state.listed() if self.path == "/api/jobs/" else None)

        def do_POST(self) -> None:
            name = self.path.removeprefix("/api/jobs/").removesuffix("/stop")
            state.stop(name)
            self._answer({"stopped": True})

        def _answer(self, body: object) -> None:
            allowed = self.headers.get("Authorization") == f"Bearer {state.token}"
            data = json.dumps(body if allowed else "no").encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    server.server_close()


def test_stop_jobs_stops_each_job_once_and_waits(jobs: Jobs):
    jobs.status = {"a": "RUNNING", "b": "PENDING", "c": "SUCCEEDED"}
    start = time.monotonic()
    outcome = stop_jobs(JobApi(jobs.address, "secret"), 10, poll_interval_s=0.05)
    assert sorted(jobs.stopped) == ["a", "b"]
    assert time.monotonic() - start >= jobs.takes_s
    assert outcome.startswith("all jobs ended")


def test_stop_jobs_names_a_job_that_does_not_end(jobs: Jobs):
    jobs.status, jobs.takes_s = {"slow": "RUNNING"}, 60
    assert stop_jobs(JobApi(jobs.address, "secret"), 0.3, poll_interval_s=0.05) == "slow still running after 0.3 s"


def test_unreachable_head_ends_the_wait(jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hooks, "UNREACHABLE_TIMEOUT_S", 0.2)
    start = time.monotonic()
    refused = stop_jobs(JobApi(jobs.address, "wrong"), 30, poll_interval_s=0.05)
    gone = stop_jobs(JobApi("http://127.0.0.1:9", "secret"), 30, poll_interval_s=0.05)
    assert time.monotonic() - start < 10
    assert "no answer for" in refused
    assert "401" in refused
    assert "no answer for" in gone


def test_running_actors_excludes_system_processes():
    names = [
        "ray::RayWorker",
        "ray::IDLE",
        "ray::ProxyActor",
        "ray::IDLE_SpillWorker",
        "raylet",
        "python ray::x",
    ]
    assert running_actors(lambda: iter(names)) == ["RayWorker"]


def test_wait_idle_waits_for_actors():
    name = f"ray::Played{os.getpid()}"
    actor = subprocess.Popen(["bash", "-c", f"exec -a '{name}' sleep 0.6"])
    try:
        while name not in " ".join(process_commands()):
            time.sleep(0.01)
        threading.Thread(target=actor.wait, daemon=True).start()
        start = time.monotonic()
        # Ignore other actors on this machine.
        outcome = wait_idle(10, 0.05, lambda: (c for c in process_commands() if c.startswith(name)))
        assert outcome.startswith("all actors ended")
        assert time.monotonic() - start < 5
    finally:
        actor.kill()


def test_hook_commands_never_fail(jobs: Jobs, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert main(["stop-jobs", "--seconds", "5", "--dashboard", jobs.address]) == 0
    monkeypatch.setattr(hooks, "process_commands", lambda: iter(["ray::LearnerActor.grpo_step"]))
    assert main(["wait-idle", "--seconds", "0.1"]) == 0
    outcome = capsys.readouterr().err.splitlines()
    assert outcome[0].startswith("stop-jobs: all jobs ended")
    assert outcome[1] == "wait-idle: LearnerActor.grpo_step still running after 0.1 s"


def test_hooks_of_the_manifests_parse(workload: Workload):
    calls = [
        command.split()
        for group in workload.groups
        for command in group.hook.removeprefix("sh -c ").split(";")
        if "cluster.hooks" in command
    ]
    assert calls
    for call in calls:
        assert call[:3] == ["python", "-m", "cluster.hooks"]
        assert hooks.parser().parse_args(call[3:]).seconds >= 90


def test_hooks_import_no_heavy_packages():
    heavy = ("ray", "torch", "numpy", "omegaconf", "psutil")
    code = f"import cluster.hooks, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_ray_job_api_has_the_routes_of_the_hooks():
    import inspect

    from ray.dashboard.modules.job import job_head

    source = inspect.getsource(job_head)
    assert '@routes.get("/api/jobs/")' in source
    assert '@routes.post("/api/jobs/{job_or_submission_id}/stop")' in source
