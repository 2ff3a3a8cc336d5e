"""Jobs on a cluster of several nodes: submit, stop, resume, node drains and node failures.

The cluster is that of `python -m cluster.local`: Ray's real job API with token authentication and the
autoscaler of KubeRay. Its nodes are local processes.
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

NUM_STEPS = 8
GROUPS = ("learner.node_group=learner", "rollout.node_group=rollout", "clips.node_group=clips")
ELASTIC = (
    "rollout.num_workers=0",
    "rollout.max_workers=2",
    "rollout.cpus_per_worker=2",
    "rollout.upscale_delay_s=0.5",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    # The directory contains Ray's sockets; the paths of pytest are too long for them.
    folder = Path(tempfile.gettempdir()) / f"vzj{time.time_ns() % 10**8}"
    local_cluster = LocalCluster(
        max_nodes=2, cpus=2, head_cpus=4, port=6421, temp_dir=folder, idle_timeout_s=8, jobs_port=8271
    )
    local_cluster.up()
    yield local_cluster
    local_cluster.down()
    assert not local_cluster.processes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.create(tmp_path_factory.mktemp("job"))


def submit(
    cluster: LocalCluster, *words: str, seconds: float = 400, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `vz-ray submit` with an address and a token, as on a machine outside of the cluster."""
    command = [sys.executable, "-m", "vz_ray.cli", "submit", *words, "--address", cluster.jobs_address]
    environment = {**cluster.environment(), **variables}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment, check=False
    )


def wait_until(condition: Callable[[], bool], timeout_s: float, description: str) -> None:
    end_time = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_time, f"timeout after {timeout_s} s: {description}"
        time.sleep(0.2)


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(row)["step"] for row in path.read_text().splitlines()] if path.exists() else []


def raylets(cluster: LocalCluster) -> list[psutil.Process]:
    """Return the raylet processes of worker nodes."""
    commands = {process: command_line(process) for process in cluster.processes()}
    return [
        p for p, words in commands.items() if "/raylet " in words and "--node_id=" in words and "--head" not in words
    ]


def workers(cluster: LocalCluster) -> list[psutil.Process]:
    return actor_processes(cluster.processes(), "RolloutWorkerActor")


def drain(cluster: LocalCluster, node: str) -> None:
    command = [sys.executable, "-m", "vz_ray.cli", "drain", "--seconds", "20", "--address", cluster.address]
    result = subprocess.run(
        [*command, "--node", node],
        env=cluster.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "gets no new work" in result.stdout


def node_of(raylet: psutil.Process) -> str:
    """Return the node id from the command line of a raylet."""
    [word] = [word for word in raylet.cmdline() if word.startswith("--node_id=")]
    return word.partition("=")[2]


def test_missing_and_wrong_tokens_are_rejected(cluster: LocalCluster) -> None:
    no_token = {"RAY_AUTH_TOKEN_PATH": "", "HOME": str(cluster.temp_dir)}
    result = submit(cluster, "--jobs", **no_token)
    assert (result.returncode, "but no token is set" in result.stderr) == (2, True), result.stderr
    result = submit(cluster, "--jobs", RAY_AUTH_TOKEN="a" * 43)
    assert (result.returncode, "the token is wrong" in result.stderr) == (2, True), result.stderr
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


def test_infeasible_run_fails_within_seconds(cluster: LocalCluster, small: SmallRun) -> None:
    started = time.monotonic()
    result = submit(
        cluster,
        "conf/laptop.yaml",
        "name=large",
        *small.overrides(),
        *GROUPS,
        "rollout.cpus_per_worker=64",
        "--check",
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "no node type of the autoscaler can hold one" in " ".join(result.stdout.split())
    assert time.monotonic() - started < 180
    # Without --check, the run itself fails at its start.
    result = submit(
        cluster, "conf/laptop.yaml", "name=large", *small.overrides(), *GROUPS, "rollout.cpus_per_worker=64"
    )
    assert result.returncode == 2, result.stdout
    assert "rollout workers: 1, 64 CPU each, node group rollout: only 0 fit" in result.stdout


def test_job_stops_and_resumes_while_nodes_change(cluster: LocalCluster, small: SmallRun) -> None:
    run = small.runs / "job"
    sizes = (
        f"train.max_steps={NUM_STEPS}",
        "train.batch_size=4",
        "train.max_sampled_tasks=4",
        "train.group_size=4",
    )
    command = ["conf/laptop.yaml", "name=job", *small.overrides(), *GROUPS, *ELASTIC, *sizes]
    result = submit(cluster, *command, "--no-follow")
    assert result.returncode == 0, result.stderr
    assert "job started: exec python -m vz_ray.cli train conf/laptop.yaml name=job" in " ".join(result.stdout.split())
    assert "is already running" in submit(cluster, *command, "--no-follow").stdout

    # Queued episodes make the autoscaler add nodes.
    wait_until(lambda: len(raylets(cluster)) >= 1, 200, "a worker node")
    wait_until(lambda: len(steps(run)) >= 2, 300, "two steps")
    result = submit(cluster, "--stop", "job", "--grace-s", "200")
    assert result.returncode == 0, result.stderr
    assert "job job stopped" in result.stdout
    before = steps(run)
    assert before == list(range(len(before)))
    assert (run / f"checkpoints/step-{len(before):06d}/state.json").exists()
    # The job's actors end and idle nodes are removed.
    wait_until(lambda: not workers(cluster), 60, "the end of the workers")
    wait_until(lambda: not raylets(cluster), 120, "removal of idle nodes")

    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(submit, cluster, *command, seconds=900)
        wait_until(
            lambda: len(workers(cluster)) >= 1 and len(steps(run)) > len(before),
            300,
            "a step of the resumed run",
        )
        drain(cluster, node_of(raylets(cluster)[0]))
        steps_at_drain = len(steps(run))
        wait_until(lambda: len(steps(run)) > steps_at_drain, 300, "a step after the drain")
        wait_until(lambda: len(raylets(cluster)) >= 1 and len(workers(cluster)) >= 1, 200, "a node to kill")
        if len(steps(run)) < NUM_STEPS:
            raylets(cluster)[-1].kill()
        result = second.result()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert "job-2 started" in result.stdout
    assert "job-2 succeeded" in result.stdout
    assert steps(run) == list(range(NUM_STEPS))
    assert all(len(tasks) == 4 for tasks in tasks_by_step(run))

    listed = submit(cluster, "--jobs").stdout
    assert "stopped" in listed
    assert "succeeded" in listed
    attached = submit(cluster, "--attach", "job")
    assert (attached.returncode, "job-2 succeeded" in attached.stdout) == (0, True)


def test_stop_waits_for_a_slow_checkpoint(cluster: LocalCluster, small: SmallRun) -> None:
    """The checkpoint takes longer than Ray's default grace period of three seconds."""
    run = small.runs / "slow"
    command = ["conf/laptop.yaml", "name=slow", *small.overrides(), *GROUPS, "train.max_steps=12"]
    assert submit(cluster, *command, "--no-follow").returncode == 0
    wait_until(lambda: len(steps(run)) >= 1, 300, "a step")

    def partial() -> list[Path]:
        return list((run / "checkpoints").glob(".*"))

    [rank] = actor_processes(cluster.processes(), "LearnerActor")
    end_time = time.monotonic() + 200
    while not partial():
        assert time.monotonic() < end_time
        time.sleep(0.002)
    rank.suspend()
    try:
        with ThreadPoolExecutor(1) as thread:
            stopping = thread.submit(submit, cluster, "--stop", "slow", "--grace-s", "200")
            time.sleep(12)
            assert not stopping.done()
            assert partial(), "the checkpoint was not being written"
            rank.resume()
            result = stopping.result()
    finally:
        with suppress(psutil.NoSuchProcess):  # the rank has exited
            rank.resume()
    assert "job slow stopped" in result.stdout, result.stdout + result.stderr
    assert not partial()
    newest = max((run / "checkpoints").iterdir())
    assert int(newest.name.partition("-")[2]) == len(steps(run))

    result = submit(cluster, *command)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert "slow-2 succeeded" in result.stdout
    assert steps(run) == list(range(12))


def test_ray_job_submit_runs_the_quickstart(cluster: LocalCluster, small: SmallRun) -> None:
    """All stages, from videos to the report, on nodes of the autoscaler."""
    words = [*small.quickstart(), *GROUPS, "sft_learner.node_group=learner", "ray.address=auto"]
    run = ["exec", "python", "-m", "vz_ray.cli", "quickstart", "--name", "whole", *words]
    command = ["ray", "job", "submit", "--address", cluster.jobs_address, "--submission-id", "whole"]
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "200"}}
    result = subprocess.run(
        [*command, "--working-dir", ".", "--runtime-env-json", json.dumps(environment), "--", *run],
        env={**cluster.environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((small.runs / "whole/summary.json").read_text())
    assert summary
    assert "<html" in (small.runs / "whole/report.html").read_text()[:2000]
