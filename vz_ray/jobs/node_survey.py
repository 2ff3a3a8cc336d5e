"""Survey of the cluster nodes: versions, directories, environment variables, GPUs.

One Ray task per node, all in parallel. A node that does not respond in time is reported by its address.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vz_ray.jobs.gpu_checks import DriverReport, installed_torch_cuda, read_driver_report
from vz_ray.utils.timeouts import StepTimeout, with_timeout

NODE_TIMEOUT_S = 60.0
"""Timeout of one node; it includes the start of a worker process."""


@dataclass(frozen=True, slots=True)
class NodeQuery:
    """What a node must check.

    Attributes:
        readable: Files and directories that must exist.
        writable: Directories that must be writable.
        shared_file: Path and content of a file that the driver wrote and the node must see.
        env_vars: Environment variables that must be set.
        gpus: Whether to read the state of the node's GPUs.
    """

    readable: Sequence[str] = ()
    writable: Sequence[str] = ()
    shared_file: tuple[str, str] | None = None
    env_vars: Sequence[str] = ()
    gpus: bool = False


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Result of one node.

    Attributes:
        node: Address of the node.
        node_groups: Node groups of the node.
        fingerprint: Versions by name; see `utils.code_fingerprint`.
        problems: Problems with directories, one sentence each.
        missing_env_vars: Required environment variables that are not set.
        shm_free_bytes: Free shared memory.
        driver: State of the node's GPUs; None if it was not queried.
        torch_cuda: CUDA version of the node's torch; empty for a CPU build.
        error: Why the node did not respond; empty if it did.
    """

    node: str
    node_groups: Sequence[str] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[str] = ()
    missing_env_vars: Sequence[str] = ()
    shm_free_bytes: int = 0
    driver: DriverReport | None = None
    torch_cuda: str = ""
    error: str = ""


async def survey_nodes(
    nodes: Sequence[Mapping[str, Any]], queries: Mapping[str, NodeQuery], node_groups: Sequence[str]
) -> list[NodeReport]:
    """Survey all nodes in parallel.

    Args:
        nodes: Entries of `ray.nodes()`.
        queries: Query by node group; the key "" applies to all nodes.
        node_groups: Names of the node groups (Ray resources).
    """
    return list(await asyncio.gather(*(_survey_node(node, queries, node_groups) for node in nodes)))


async def _survey_node(
    node: Mapping[str, Any], queries: Mapping[str, NodeQuery], node_groups: Sequence[str]
) -> NodeReport:
    address = str(node["NodeManagerAddress"])
    own_groups = [group for group in node_groups if node["Resources"].get(group)]
    own_queries = [query for group in ("", *own_groups) if (query := queries.get(group))]
    if not node["Resources"].get("GPU"):
        own_queries = [replace(query, gpus=False) for query in own_queries]
    affinity = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = _run_queries.options(scheduling_strategy=affinity).remote(own_queries)
    try:
        results = await with_timeout(
            task, NODE_TIMEOUT_S, target=f"node {address}", operation="pre-flight checks of the node"
        )
    except StepTimeout as error:
        ray.cancel(task, force=True)
        return NodeReport(address, own_groups, error=str(error))
    except RayTaskError as error:
        return NodeReport(address, own_groups, error=f"{type(error.cause).__name__}: {error.cause}")
    except RayError as error:
        return NodeReport(address, own_groups, error=str(error).strip().splitlines()[0])
    return NodeReport(address, own_groups, *results)


@ray.remote(num_cpus=0, max_retries=0)
def _run_queries(
    queries: Sequence[NodeQuery],
) -> tuple[dict[str, str], list[str], list[str], int, DriverReport | None, str]:
    from vz_ray.utils.code_fingerprint import code_fingerprint

    problems = [problem for query in queries for problem in check_directories(query)]
    missing = [name for query in queries for name in missing_env_vars(query)]
    shm_free_bytes = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    driver = read_driver_report() if any(query.gpus for query in queries) else None
    return dict(code_fingerprint()), problems, missing, shm_free_bytes, driver, installed_torch_cuda()


def check_directories(query: NodeQuery) -> list[str]:
    """Return the problems with the directories, as seen by this process."""
    problems = [f"{path} does not exist" for path in query.readable if not Path(path).exists()]
    problems += [error for path in query.writable if (error := write_error(Path(path)))]
    if query.shared_file is not None:
        path, content = query.shared_file
        try:
            matches = Path(path).read_text() == content
        except OSError:
            matches = False
        if not matches:
            problems.append(f"{Path(path).parent} is not the driver's directory; it must be one shared volume")
    return problems


def missing_env_vars(query: NodeQuery) -> list[str]:
    """Return the required environment variables that are not set in this process."""
    return [name for name in query.env_vars if not os.environ.get(name)]


_TEST_FILE_BYTES = 1 << 20


def write_error(directory: Path) -> str:
    """Return why `directory` is not writable; empty if it is. A missing directory is created."""
    test_file = directory / f".vz_ray-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(test_file, "wb") as file:
            file.write(b"\0" * _TEST_FILE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write to {directory}: {error.strerror or error}"
    finally:
        if _exists(test_file):
            test_file.unlink(missing_ok=True)
    return ""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
