"""What each node of a cluster says of itself: versions, directories, variables.

A task on every node, all at once; a node that does not answer in time is named.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vz_ray.utils.timeouts import StepTimeout, with_timeout

NODE_TIMEOUT_S = 60.0
"""How long a node may take: a process that imports little has to start there."""


@dataclass(frozen=True, slots=True)
class NodeQuery:
    """What nodes are asked.

    Attributes:
        readable: Files and directories that must be there.
        writable: Directories in which a file is written, and taken away again.
        shared_file: A file of the driver's that must be seen, and what is in it.
        env_vars: Environment variables that must be set.
    """

    readable: Sequence[str] = ()
    writable: Sequence[str] = ()
    shared_file: tuple[str, str] | None = None
    env_vars: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node says.

    Attributes:
        node: Its address.
        node_groups: It belongs to.
        fingerprint: Versions by name; see `monitoring.fingerprint`.
        problems: What is wrong with directories, one sentence each.
        missing_env_vars: Variables that it lacks.
        shm_free_bytes: Bytes of shared memory that are free.
        error: Why it did not answer; empty if it did.
    """

    node: str
    node_groups: Sequence[str] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[str] = ()
    missing_env_vars: Sequence[str] = ()
    shm_free_bytes: int = 0
    error: str = ""


async def survey_nodes(
    nodes: Sequence[Mapping[str, Any]], asked: Mapping[str, NodeQuery], groups: Sequence[str]
) -> list[NodeReport]:
    """Asks nodes of `ray.nodes()`, all at once.

    Args:
        nodes: Those that are asked.
        asked: Questions by the group of the node; those under "" are for all.
        groups: Resources that are names of groups.
    """
    return list(await asyncio.gather(*(_ask(node, asked, groups) for node in nodes)))


async def _ask(node: Mapping[str, Any], asked: Mapping[str, NodeQuery], groups: Sequence[str]) -> NodeReport:
    address = str(node["NodeManagerAddress"])
    of = [group for group in groups if node["Resources"].get(group)]
    questions = [there for group in ("", *of) if (there := asked.get(group))]
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = _answer.options(scheduling_strategy=here).remote(questions)
    try:
        found = await with_timeout(
            task, NODE_TIMEOUT_S, target=f"node {address}", operation="a look at its versions and directories"
        )
    except StepTimeout as error:
        ray.cancel(task, force=True)
        return NodeReport(address, of, error=str(error))
    except RayTaskError as error:
        return NodeReport(address, of, error=f"{type(error.cause).__name__}: {error.cause}")
    except RayError as error:
        return NodeReport(address, of, error=str(error).strip().splitlines()[0])
    return NodeReport(address, of, *found)


@ray.remote(num_cpus=0, max_retries=0)
def _answer(questions: Sequence[NodeQuery]) -> tuple[dict[str, str], list[str], list[str], int]:
    from vz_ray.utils.code_fingerprint import code_fingerprint

    troubles = [trouble for one in questions for trouble in check_directories(one)]
    lacks = [name for one in questions for name in missing_env_vars(one)]
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return dict(code_fingerprint()), troubles, lacks, shm


def check_directories(asked: NodeQuery) -> list[str]:
    """What is wrong with the directories as this process sees them."""
    found = [f"{path} is not there" for path in asked.readable if not Path(path).exists()]
    found += [trouble for path in asked.writable if (trouble := write_error(Path(path)))]
    if asked.shared_file is not None:
        path, content = asked.shared_file
        try:
            same = Path(path).read_text() == content
        except OSError:
            same = False
        if not same:
            found.append(f"{Path(path).parent} is not the driver's directory: it must be one shared volume")
    return found


def missing_env_vars(asked: NodeQuery) -> list[str]:
    """Variables that this process lacks."""
    return [name for name in asked.env_vars if not os.environ.get(name)]


_TRY_BYTES = 1 << 20


def write_error(directory: Path) -> str:
    """Why nothing can be written in a directory; empty if it can. It is made if it is not there."""
    trial = directory / f".vz_ray-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(trial, "wb") as file:
            file.write(b"\0" * _TRY_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"nothing can be written to {directory}: {error.strerror or error}"
    finally:
        trial.unlink(missing_ok=True) if _there(trial) else None
    return ""


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
