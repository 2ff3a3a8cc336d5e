"""A run as a job on a cluster of several nodes: sent, stopped, gone on with, through nodes that go.

The cluster is the one of `python -m cluster.local`, with Ray's real job API behind a token and the
autoscaler of Kubernetes; its nodes are processes here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.local import LocalCluster
from tests.ray_nodes import actor_processes
from tests.small_run import ROOT, SmallRun, command_line, tasks_by_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ITERATIONS = 8
GROUPS = ("learner.node_group=learner", "rollout.node_group=rollout", "clips.node_group=clips")
ELASTIC = (
    "rollout.num_workers=0",
    "rollout.max_workers=2",
    "rollout.cpus_per_worker=2",
    "rollout.upscale_delay_s=0.5",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    # Ray's sockets lie in it: pytest's own paths are too long.
    folder = Path(tempfile.gettempdir()) / f"vzj{time.time_ns() % 10**8}"
    made = LocalCluster(
        max_nodes=2, cpus=2, head_cpus=4, port=6421, temp_dir=folder, idle_timeout_s=8, jobs_port=8271
    )
    made.up()
    yield made
    made.down()
    assert not made.processes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.create(tmp_path_factory.mktemp("job"))


def submit(
    cluster: LocalCluster, *words: str, seconds: float = 400, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`vz-ray submit`, as someone on another machine calls it: with an address and a token."""
    command = [sys.executable, "-m", "vz_ray.cli", "submit", *words, "--address", cluster.jobs_address]
    environment = {**cluster.environment(), **variables}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment, check=False
    )


def until(what: Callable[[], bool], seconds: float, why: str) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"it did not come within {seconds} s: {why}"
        time.sleep(0.2)


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(row)["step"] for row in path.read_text().splitlines()] if path.exists() else []


def raylets(cluster: LocalCluster) -> list[psutil.Process]:
    """Those of worker nodes."""
    commands = {process: command_line(process) for process in cluster.processes()}
    return [
        p
        for p, words in commands.items()
        if "/raylet " in words and "--node_id=" in words and "--head" not in words
    ]


def workers(cluster: LocalCluster) -> list[psutil.Process]:
    return actor_processes(cluster.processes(), "RolloutWorkerActor")


def drain(cluster: LocalCluster, node: str) -> None:
    command = [sys.executable, "-m", "vz_ray.cli", "drain", "--seconds", "20", "--address", cluster.address]
    done = subprocess.run(
        [*command, "--node", node],
        env=cluster.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gets no new work" in done.stdout


def node_of(raylet: psutil.Process) -> str:
    """Ray's id of a node, as its raylet was told it."""
    [word] = [word for word in raylet.cmdline() if word.startswith("--node_id=")]
    return word.partition("=")[2]


def test_without_the_token_nobody_is_let_in(cluster: LocalCluster) -> None:
    none = {"RAY_AUTH_TOKEN_PATH": "", "HOME": str(cluster.temp_dir)}
    done = submit(cluster, "--jobs", **none)
    assert (done.returncode, "none was found" in done.stderr) == (2, True), done.stderr
    done = submit(cluster, "--jobs", RAY_AUTH_TOKEN="a" * 43)
    assert (done.returncode, "the token is wrong" in done.stderr) == (2, True), done.stderr
    raw = subprocess.run(
        ["ray", "job", "list", "--address", cluster.jobs_address],
        env={
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert raw.returncode != 0
    assert "401" in raw.stderr + raw.stdout or "nauthorized" in raw.stderr + raw.stdout


def test_what_no_node_can_hold_is_said_in_seconds(cluster: LocalCluster, small: SmallRun) -> None:
    began = time.monotonic()
    done = submit(
        cluster,
        "conf/tiny.yaml",
        "name=large",
        *small.overrides(),
        *GROUPS,
        "rollout.cpus_per_worker=64",
        "--check",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no node type of the autoscaler has room for one" in " ".join(done.stdout.split())
    assert time.monotonic() - began < 180
    # A run that is started all the same ends at once, and says so.
    done = submit(
        cluster, "conf/tiny.yaml", "name=large", *small.overrides(), *GROUPS, "rollout.cpus_per_worker=64"
    )
    assert done.returncode == 2, done.stdout
    assert "rollout workers: 1, 64 CPU each, in the group rollout: 0 of them find a place" in done.stdout


def test_a_job_is_stopped_and_gone_on_with_while_nodes_come_and_go(
    cluster: LocalCluster, small: SmallRun
) -> None:
    run = small.runs / "job"
    sizes = (
        f"train.max_steps={ITERATIONS}",
        "train.batch_size=4",
        "train.max_sampled_tasks=4",
        "train.group_size=4",
    )
    command = ["conf/tiny.yaml", "name=job", *small.overrides(), *GROUPS, *ELASTIC, *sizes]
    done = submit(cluster, *command, "--no-follow")
    assert done.returncode == 0, done.stderr
    assert "job is started: exec python -m vz_ray.cli train conf/tiny.yaml name=job" in " ".join(
        done.stdout.split()
    )
    assert "is under way already" in submit(cluster, *command, "--no-follow").stdout

    # Nodes come because episodes wait for a place.
    until(lambda: len(raylets(cluster)) >= 1, 200, "a node for workers")
    until(lambda: len(steps(run)) >= 2, 300, "two iterations")
    done = submit(cluster, "--stop", "job", "--grace-s", "200")
    assert done.returncode == 0, done.stderr
    assert "the job job was stopped" in done.stdout
    before = steps(run)
    assert before == list(range(len(before)))
    assert (run / f"checkpoints/step-{len(before):06d}/state.json").exists()
    # The cluster has nothing of it left, and its nodes go.
    until(lambda: not workers(cluster), 60, "the end of its workers")
    until(lambda: not raylets(cluster), 120, "idle nodes going")

    with ThreadPoolExecutor(1) as thread:
        again = thread.submit(submit, cluster, *command, seconds=900)
        until(lambda: len(workers(cluster)) >= 1 and len(steps(run)) > len(before), 300, "going on")
        drain(cluster, node_of(raylets(cluster)[0]))
        here = len(steps(run))
        until(lambda: len(steps(run)) > here, 300, "an iteration after a node was drained")
        until(lambda: len(raylets(cluster)) >= 1 and len(workers(cluster)) >= 1, 200, "a node to kill")
        if len(steps(run)) < ITERATIONS:
            raylets(cluster)[-1].kill()
        done = again.result()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "job-2 is started" in done.stdout
    assert "job-2 is done" in done.stdout
    assert steps(run) == list(range(ITERATIONS))
    assert all(len(tasks) == 4 for tasks in tasks_by_step(run))

    listed = submit(cluster, "--jobs").stdout
    assert "stopped" in listed
    assert "succeeded" in listed
    attached = submit(cluster, "--attach", "job")
    assert (attached.returncode, "job-2 is done" in attached.stdout) == (0, True)


def test_a_stop_in_the_middle_of_a_slow_checkpoint_leaves_a_whole_one(
    cluster: LocalCluster, small: SmallRun
) -> None:
    """Slower than the three seconds after which Ray kills a job that does not say otherwise."""
    run = small.runs / "slow"
    command = ["conf/tiny.yaml", "name=slow", *small.overrides(), *GROUPS, "train.max_steps=12"]
    assert submit(cluster, *command, "--no-follow").returncode == 0
    until(lambda: len(steps(run)) >= 1, 300, "an iteration")

    def partial() -> list[Path]:
        return list((run / "checkpoints").glob(".*"))

    [rank] = actor_processes(cluster.processes(), "LearnerRank")
    end = time.monotonic() + 200
    while not partial():
        assert time.monotonic() < end
        time.sleep(0.002)
    rank.suspend()
    try:
        with ThreadPoolExecutor(1) as thread:
            stopping = thread.submit(submit, cluster, "--stop", "slow", "--grace-s", "200")
            time.sleep(12)
            assert not stopping.done()
            assert partial(), "the checkpoint was not under way"
            rank.resume()
            done = stopping.result()
    finally:
        with suppress(psutil.NoSuchProcess):  # it has ended, as it should
            rank.resume()
    assert "the job slow was stopped" in done.stdout, done.stdout + done.stderr
    assert not partial()
    newest = max((run / "checkpoints").iterdir())
    assert int(newest.name.partition("-")[2]) == len(steps(run))

    done = submit(cluster, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "slow-2 is done" in done.stdout
    assert steps(run) == list(range(12))


def test_rays_own_command_runs_the_quickstart(cluster: LocalCluster, small: SmallRun) -> None:
    """Every stage, from videos to the report, with engines on nodes that come for them."""
    words = [*small.quickstart(), *GROUPS, "sft_learner.node_group=learner", "ray.address=auto"]
    run = ["exec", "python", "-m", "vz_ray.cli", "quickstart", "--name", "whole", *words]
    command = ["ray", "job", "submit", "--address", cluster.jobs_address, "--submission-id", "whole"]
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "200"}}
    done = subprocess.run(
        [*command, "--working-dir", ".", "--runtime-env-json", json.dumps(environment), "--", *run],
        env={**cluster.environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((small.runs / "whole/summary.json").read_text())
    assert summary
    assert "<html" in (small.runs / "whole/report.html").read_text()[:2000]
