"""Hooks against a server that speaks as Ray's job API does, and against real processes."""

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
from cluster.hooks import JobApi, main, process_commands, running_actors, stop_jobs, wait_for_jobs, wait_idle
from cluster.manifests import Bundle
from cluster.manifests.schema import ROOT


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


def test_the_head_asks_each_running_job_once_and_waits_until_all_have_ended(jobs: Jobs):
    jobs.status = {"a": "RUNNING", "b": "PENDING", "c": "SUCCEEDED"}
    begun = time.monotonic()
    said = stop_jobs(JobApi(jobs.address, "secret"), 10, poll_interval_s=0.05)
    assert sorted(jobs.stopped) == ["a", "b"]
    assert time.monotonic() - begun >= jobs.takes_s
    assert said.startswith("no jobs left")


def test_a_job_that_does_not_end_is_named_when_the_time_is_over(jobs: Jobs):
    jobs.status, jobs.takes_s = {"slow": "RUNNING"}, 60
    assert stop_jobs(JobApi(jobs.address, "secret"), 0.3, poll_interval_s=0.05) == "slow not done after 0.3 s"


def test_the_learner_asks_nobody_to_stop_and_stays_as_long_as_a_job_runs(jobs: Jobs):
    jobs.status = {"a": "RUNNING"}
    threading.Timer(0.3, jobs.status.update, [{"a": "STOPPED"}]).start()
    begun = time.monotonic()
    said = wait_for_jobs(JobApi(jobs.address, "secret"), 10, poll_interval_s=0.05)
    assert 0.25 <= time.monotonic() - begun < 5
    assert (jobs.stopped, said[:12]) == ([], "no jobs left")


def test_a_head_that_is_gone_or_refuses_is_not_waited_for_to_the_end(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hooks, "UNREACHABLE_TIMEOUT_S", 0.2)
    begun = time.monotonic()
    refused = wait_for_jobs(JobApi(jobs.address, "wrong"), 30, poll_interval_s=0.05)
    gone = wait_for_jobs(JobApi("http://127.0.0.1:9", "secret"), 30, poll_interval_s=0.05)
    assert time.monotonic() - begun < 10
    assert "nobody has answered" in refused
    assert "401" in refused
    assert "nobody has answered" in gone


def test_actors_are_told_from_what_lives_as_long_as_its_node():
    names = [
        "ray::RayWorker",
        "ray::IDLE",
        "ray::ProxyActor",
        "ray::IDLE_SpillWorker",
        "raylet",
        "python ray::x",
    ]
    assert running_actors(lambda: iter(names)) == ["RayWorker"]


def test_a_rollout_pod_stays_until_its_actors_have_ended():
    name = f"ray::Played{os.getpid()}"
    actor = subprocess.Popen(["bash", "-c", f"exec -a '{name}' sleep 0.6"])
    try:
        while name not in " ".join(process_commands()):
            time.sleep(0.01)
        threading.Thread(target=actor.wait, daemon=True).start()
        begun = time.monotonic()
        # Other actors of this machine are not of this test.
        said = wait_idle(10, 0.05, lambda: (c for c in process_commands() if c.startswith(name)))
        assert said.startswith("no actors left")
        assert time.monotonic() - begun < 5
    finally:
        actor.kill()


def test_the_commands_of_manifests_take_their_arguments_and_never_fail(jobs: Jobs, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert main(["stop-jobs", "--seconds", "5", "--dashboard", jobs.address]) == 0
    assert main(["wait-for-jobs", "--seconds", "0.1", "--dashboard", "http://127.0.0.1:9"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("stop-jobs: no jobs left")
    assert said[1].startswith("wait-for-jobs: ")


@pytest.mark.parametrize("name", ["spot", "interactive", "serve", "sft-8gpu"])
def test_every_hook_in_the_manifests_is_one_that_there_is(overlay, name):
    calls = [
        command.split()
        for group in Bundle(overlay(name)).groups
        for command in group.hook().removeprefix("sh -c ").split(";")
        if "cluster.hooks" in command
    ]
    assert calls
    for call in calls:
        assert call[:3] == ["python", "-m", "cluster.hooks"]
        assert hooks.parser().parse_args(call[3:]).seconds >= 90


def test_hooks_begin_without_importing_what_takes_seconds():
    heavy = ("ray", "torch", "numpy", "omegaconf", "psutil")
    code = f"import cluster.hooks, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rays_job_api_has_the_routes_that_hooks_ask():
    import inspect

    from ray.dashboard.modules.job import job_head

    source = inspect.getsource(job_head)
    assert '@routes.get("/api/jobs/")' in source
    assert '@routes.post("/api/jobs/{job_or_submission_id}/stop")' in source
