"""The cluster to rehearse on: nodes come with what waits for them and go, and it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from tests.small_run import SmallRun, vz_ray
from vz_ray.observe.errors import UserError

pytestmark = pytest.mark.timeout(900)

WORK = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=2)
class Waiting:
    def node(self):
        return ray.get_runtime_context().get_node_id()

actors = [Waiting.remote() for _ in range(4)]
print(len(set(ray.get([actor.node.remote() for actor in actors], timeout=60))))
del actors
end = time.monotonic() + 90
while ray.cluster_resources()["CPU"] > 4 and time.monotonic() < end:
    time.sleep(0.5)
print(ray.cluster_resources()["CPU"])
"""


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    # Ray's sockets lie in it: pytest's own paths are too long.
    folder = Path(tempfile.gettempdir()) / f"vzc{time.time_ns() % 10**8}"
    made = LocalCluster(nodes=2, cpus=2, head_cpus=4, port=6411, folder=folder, idle_s=5)
    made.up()
    yield made
    made.down()
    assert not made.processes()


def test_nodes_come_for_what_waits_and_go_when_idle(cluster: LocalCluster) -> None:
    with pytest.raises(UserError, match="runs already"):
        cluster.up()
    command = [sys.executable, "-c", WORK, cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "4.0"]


@pytest.mark.slow
def test_a_run_grows_onto_nodes_that_come_for_it_and_every_episode_counts_once(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    small = SmallRun.make(tmp_path)
    done = vz_ray(
        "train",
        "conf/tiny.yaml",
        "name=elastic",
        *small.overrides(),
        f"ray.address={cluster.address}",
        "rollout.workers=1",
        "rollout.max_workers=3",
        "rollout.cpus_per_worker=2",
        "rollout.episodes_per_worker=2",
        "rollout.grow_s=0.5",
        "rollout.shrink_s=600",
        "train.iterations=12",
        "train.tasks=8",
        "train.max_tasks=8",
        seconds=800,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (small.runs / "elastic/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert max(row["fleet/workers"] for row in rows) == 3
    assert {row["groups/played"] for row in rows} == {8}
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
