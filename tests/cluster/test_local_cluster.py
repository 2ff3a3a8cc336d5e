"""The cluster to rehearse on: nodes come with what waits for them and go, and it leaves nothing behind."""

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
print(len(set(ray.get([actor.node.remote() for actor in actors], timeout=150))))
del actors
end = time.monotonic() + 90
while ray.cluster_resources()["CPU"] > 4 and time.monotonic() < end:
    time.sleep(0.5)
print(ray.cluster_resources()["CPU"])
"""


ITERATIONS = 16


def nodes(cluster: LocalCluster) -> int:
    """Worker nodes: raylets besides the head's."""
    ours = {process.pid for process in cluster.processes()}
    named = psutil.process_iter(["pid", "name"])
    return sum(found.info["name"] == "raylet" and found.info["pid"] in ours for found in named) - 1


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    # Ray's sockets lie in it: pytest's own paths are too long.
    folder = Path(tempfile.gettempdir()) / f"vzc{time.time_ns() % 10**8}"
    made = LocalCluster(max_nodes=2, cpus=2, head_cpus=4, port=6411, temp_dir=folder, idle_timeout_s=5)
    made.up()
    yield made
    made.down()
    assert not made.processes()


def test_nodes_come_for_what_waits_and_go_when_idle(cluster: LocalCluster) -> None:
    with pytest.raises(UserError, match="runs already"):
        cluster.up()
    command = [sys.executable, "-c", WORK, cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "4.0"]


@pytest.mark.slow
@pytest.mark.parametrize("least", [1, 0])
def test_a_run_grows_onto_nodes_that_come_for_it_gives_them_back_and_grows_again(
    cluster: LocalCluster, tmp_path: Path, least: int
) -> None:
    """From the fewest workers to three and back and to three, as the learner takes one long step between."""
    small = SmallRun.create(tmp_path)
    process = start_vz_ray(
        "train",
        "conf/tiny.yaml",
        "name=elastic",
        *small.overrides(),
        f"ray.address={cluster.address}",
        f"rollout.num_workers={least}",
        "rollout.max_workers=3",
        "rollout.cpus_per_worker=2",
        "rollout.max_concurrent_episodes=2",
        "rollout.upscale_delay_s=0.5",
        "rollout.downscale_delay_s=10",
        f"train.max_steps={ITERATIONS}",
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
        [learner] = actor_processes(cluster.processes(), "LearnerRank")
        learner.suspend()
        wait_until(
            lambda: len(actor_processes(cluster.processes(), "RolloutWorkerActor")) == least, process, 200
        )
        wait_until(lambda: nodes(cluster) <= least, process, 100)
        before = len(workers())
        learner.resume()
        wait_until(lambda: 3 in workers()[before + 1 :], process, 400)
        done = wait_for_exit(process, 600)
    finally:
        process.kill()
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(ITERATIONS))
    assert {row["groups/sampled"] for row in rows} == {8}
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
