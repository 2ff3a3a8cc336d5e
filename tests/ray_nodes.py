"""Ray cluster of several local nodes that tests can add, drain and kill."""

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

# A killed raylet is detected after three failed health checks. A long timeout tolerates a busy machine.
HEALTH = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 3,
}


class RayNodes:
    """Worker nodes of a cluster; the driver runs on the head. Created by `start_ray_nodes`."""

    def __init__(self, cluster: Cluster, folder: str) -> None:
        self._cluster, self._folder = cluster, folder

    @property
    def address(self) -> str:
        """Address of the cluster."""
        return str(self._cluster.address)

    def add(self, **resources: float) -> Any:
        """Add a node with `num_cpus`, `num_gpus`, ...; return it once it is registered."""
        return self._cluster.add_node(**resources)

    def drain(self, node: Any, reason: str, notice_s: float) -> None:
        """Announce the preemption of a node in `notice_s` seconds, as a cloud does."""
        accepted, refusal = ray._raylet.GcsClient(address=self._cluster.address).drain_node(
            node.node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            reason,
            int((time.time() + notice_s) * 1000),
        )
        assert accepted, refusal

    def kill(self, node: Any) -> None:
        """Kill the raylet of a node without notice, and with it all its processes."""
        raylet = node.all_processes[RAYLET][0].process
        raylet.kill()
        # Ray processes check whether their raylet's process id exists; a zombie still has one.
        raylet.wait()

    def is_gone(self, node: Any) -> bool:
        """Return whether the raylet of a node has ended."""
        return node.all_processes[RAYLET][0].process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the cluster, including children."""
        roots = [child for child in psutil.Process().children() if self._folder in command_line(child)]
        return [process for root in roots for process in (root, *root.children(recursive=True))]

    def actor_processes(self, kind: str) -> list[psutil.Process]:
        """Return the processes of the actors of a class."""
        return actor_processes(self.processes(), kind)

    def actor_children(self, kind: str) -> list[psutil.Process]:
        """Return the child processes of the actors of a class."""
        return [below for actor in self.actor_processes(kind) for below in actor.children(recursive=True)]


def actor_processes(processes: Iterable[psutil.Process], kind: str) -> list[psutil.Process]:
    """Return the processes that are actors of a class."""
    return [process for process in processes if command_line(process).startswith(f"ray::{kind}")]


@contextmanager
def start_ray_nodes(**head: float) -> Iterator[RayNodes]:
    """Run a cluster with this process as driver inside the block; `head` are the resources of the head."""
    # Contains socket paths; pytest's paths are too long.
    folder = tempfile.mkdtemp(prefix="vzn")
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise Ray stores the address where every `ray.init` on this machine finds it.
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
            processes = nodes.processes()
            ray.shutdown()
            cluster.shutdown()
            _terminate(processes)
            shutil.rmtree(folder, ignore_errors=True)


def _terminate(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=3)
    for process in alive:
        try:
            process.kill()
        except psutil.Error:
            continue  # already ended
