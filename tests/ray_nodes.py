"""A Ray of several nodes on this machine: raylets that are added, drained and killed while a driver works."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.small_run import command_line

RAYLET = "raylet"

# A raylet that was killed refuses to be called, and is noticed after three calls. One that is merely
# starved, where the machine is busy, may take long to answer.
HEALTH = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 3,
}


class RayNodes:
    """The nodes besides the head, where the driver is. Made by `started`."""

    def __init__(self, cluster: Cluster, folder: str) -> None:
        self._cluster, self._folder = cluster, folder

    @property
    def address(self) -> str:
        """Where it is joined."""
        return str(self._cluster.address)

    def add(self, **resources: float) -> Any:
        """A node with `num_cpus`, `num_gpus` and so on; returned once the cluster knows it."""
        return self._cluster.add_node(**resources)

    def drain(self, node: Any, reason: str, notice_s: float) -> None:
        """Gives notice that the node will be gone in `notice_s`, as a cloud does before it reclaims one."""
        accepted, refusal = ray._raylet.GcsClient(address=self._cluster.address).drain_node(
            node.node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            reason,
            int((time.time() + notice_s) * 1000),
        )
        assert accepted, refusal

    def kill(self, node: Any) -> None:
        """Takes the node away without notice: its raylet is killed, and with it goes what it started."""
        raylet = node.all_processes[RAYLET][0].process
        raylet.kill()
        # Ray's processes ask whether their raylet's id still exists, and a zombie's does.
        raylet.wait()

    def is_gone(self, node: Any) -> bool:
        """Whether the node's raylet has ended."""
        return node.all_processes[RAYLET][0].process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """All of the cluster's, on every node, with what they have started."""
        roots = [child for child in psutil.Process().children() if self._folder in command_line(child)]
        return [process for root in roots for process in (root, *root.children(recursive=True))]

    def actor_processes(self, kind: str) -> list[psutil.Process]:
        """The processes of the actors of a class."""
        return actor_processes(self.processes(), kind)

    def actor_children(self, kind: str) -> list[psutil.Process]:
        """What the actors of a class have started."""
        return [below for actor in self.actor_processes(kind) for below in actor.children(recursive=True)]


def actor_processes(processes: Iterable[psutil.Process], kind: str) -> list[psutil.Process]:
    """Those that are actors of a class."""
    return [process for process in processes if command_line(process).startswith(f"ray::{kind}")]


@contextmanager
def start_ray_nodes(**head: float) -> Iterator[RayNodes]:
    """A head with these resources and this process as its driver; all of it ends with the block."""
    # Ray's sockets lie in it: pytest's own paths are too long.
    folder = tempfile.mkdtemp(prefix="vzn")
    with pytest.MonkeyPatch.context() as patch:
        # Else Ray notes the address where every `ray.init` on this machine looks for a cluster to join.
        patch.setenv("RAY_TMPDIR", folder)
        os.mkdir(f"{folder}/ray")
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"include_dashboard": False, "_system_config": HEALTH, **head},
        )
        nodes = RayNodes(cluster, folder)
        try:
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            yield nodes
        finally:
            all_of_it = nodes.processes()
            ray.shutdown()
            cluster.shutdown()
            _end(all_of_it)
            shutil.rmtree(folder, ignore_errors=True)


def _end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=3)
    for process in alive:
        try:
            process.kill()
        except psutil.Error:
            continue  # it has just ended
