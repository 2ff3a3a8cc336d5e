"""Local cluster: the autoscaler adds and removes nodes, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.local import LocalCluster
from tests.ray_nodes import actor_processes
from tests.small_run import SmallRun, start_vz_ray, wait_for_exit, wait_until
from vz_ray.utils.errors import UserError

pytestmark = pytest.mark.timeout(900)

WORK = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=2)
class Waiting:
    def node(self):
        return ray.get_runtime_context().get_node_id()

actors = [Waiting.remote() for _ in range(4)]
print("nodes", len(set(ray.get([actor.node.remote() for actor in actors], timeout=150))))
del actors
end = time.monotonic() + 90
while ray.cluster_resources()["CPU"] > 4 and time.monotonic() < end:
    time.sleep(0.5)
print("cpus", ray.cluster_resources()["CPU"])
"""


STEPS = 16


def count_worker_nodes(cluster: LocalCluster) -> int:
    """Return the number of worker nodes: raylets except the head's."""
    pids = {process.pid for process in cluster.processes()}
    processes = psutil.process_iter(["pid", "name"])
    return sum(p.info["name"] == "raylet" and p.info["pid"] in pids for p in processes) - 1


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    # Contains socket paths; pytest's paths are too long.
    folder = Path(tempfile.gettempdir()) / f"vzc{time.time_ns() % 10**8}"
    local = LocalCluster(max_nodes=2, cpus=2, head_cpus=4, port=6411, temp_dir=folder, idle_timeout_s=5)
    local.up()
    yield local
    local.down()
    assert not local.processes()


def test_nodes_are_added_on_demand_and_removed_when_idle(cluster: LocalCluster) -> None:
    with pytest.raises(UserError, match="is already running"):
        cluster.up()
    command = [sys.executable, "-c", WORK, cluster.address]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    # Ray may print warnings between these lines while nodes are being added.
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith(("nodes ", "cpus "))] == ["nodes 3", "cpus 4.0"]


@pytest.mark.slow
@pytest.mark.parametrize("min_workers", [1, 0])
def test_run_scales_up_down_and_up_again(cluster: LocalCluster, tmp_path: Path, min_workers: int) -> None:
    """The learner is suspended in between, so the rollout workers become idle."""
    small = SmallRun.create(tmp_path)
    process = start_vz_ray(
        "train",
        "conf/laptop.yaml",
        "name=elastic",
        *small.overrides(),
        f"ray.address={cluster.address}",
        f"rollout.num_workers={min_workers}",
        "rollout.max_workers=3",
        "rollout.cpus_per_worker=2",
        "rollout.max_concurrent_episodes=2",
        "rollout.upscale_delay_s=0.5",
        "rollout.downscale_delay_s=10",
        f"train.max_steps={STEPS}",
        "train.batch_size=8",
        "train.max_sampled_tasks=8",
        "train.group_size=4",
    )
    metrics = small.runs / "elastic/metrics.jsonl"

    def workers() -> list[float]:
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(row)["rollout/workers"] for row in rows]

    try:
        wait_until(lambda: 3 in workers(), process, 400)
        [learner] = actor_processes(cluster.processes(), "LearnerActor")
        learner.suspend()
        wait_until(
            lambda: len(actor_processes(cluster.processes(), "RolloutWorkerActor")) == min_workers,
            process,
            200,
        )
        wait_until(lambda: count_worker_nodes(cluster) <= min_workers, process, 100)
        num_rows = len(workers())
        learner.resume()
        wait_until(lambda: 3 in workers()[num_rows + 1 :], process, 400)
        result = wait_for_exit(process, 600)
    finally:
        process.kill()
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert {row["groups/sampled"] for row in rows} == {8}
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
