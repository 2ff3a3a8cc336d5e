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

from vz_ray.observe.deadline import Overdue, within

ANSWER_S = 60.0
"""How long a node may take: a process that imports little has to start there."""


@dataclass(frozen=True, slots=True)
class Questions:
    """What nodes are asked.

    Attributes:
        readable: Files and directories that must be there.
        writable: Directories in which a file is written, and taken away again.
        shared: A file of the driver's that must be seen, and what is in it.
        variables: Environment variables that must be set.
    """

    readable: Sequence[str] = ()
    writable: Sequence[str] = ()
    shared: tuple[str, str] | None = None
    variables: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Answers:
    """What a node says.

    Attributes:
        node: Its address.
        groups: It belongs to.
        fingerprint: Versions by name; see `observe.fingerprint`.
        troubles: What is wrong with directories, one sentence each.
        unset: Variables that it lacks.
        shm_free: Bytes of shared memory that are free.
        silent: Why it did not answer; empty if it did.
    """

    node: str
    groups: Sequence[str] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    troubles: Sequence[str] = ()
    unset: Sequence[str] = ()
    shm_free: int = 0
    silent: str = ""


async def survey(
    nodes: Sequence[Mapping[str, Any]], asked: Mapping[str, Questions], groups: Sequence[str]
) -> list[Answers]:
    """Asks nodes of `ray.nodes()`, all at once.

    Args:
        nodes: Those that are asked.
        asked: Questions by the group of the node; those under "" are for all.
        groups: Resources that are names of groups.
    """
    return list(await asyncio.gather(*(_ask(node, asked, groups) for node in nodes)))


async def _ask(node: Mapping[str, Any], asked: Mapping[str, Questions], groups: Sequence[str]) -> Answers:
    address = str(node["NodeManagerAddress"])
    of = [group for group in groups if node["Resources"].get(group)]
    questions = [there for group in ("", *of) if (there := asked.get(group))]
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = _answer.options(scheduling_strategy=here).remote(questions)
    try:
        found = await within(
            ANSWER_S, task, who=f"node {address}", what="a look at its versions and directories"
        )
    except Overdue as error:
        ray.cancel(task, force=True)
        return Answers(address, of, silent=str(error))
    except RayTaskError as error:
        return Answers(address, of, silent=f"{type(error.cause).__name__}: {error.cause}")
    except RayError as error:
        return Answers(address, of, silent=str(error).strip().splitlines()[0])
    return Answers(address, of, *found)


@ray.remote(num_cpus=0, max_retries=0)
def _answer(questions: Sequence[Questions]) -> tuple[dict[str, str], list[str], list[str], int]:
    from vz_ray.observe.fingerprint import fingerprint

    troubles = [trouble for one in questions for trouble in look(one)]
    lacks = [name for one in questions for name in unset(one)]
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return dict(fingerprint()), troubles, lacks, shm


def look(asked: Questions) -> list[str]:
    """What is wrong with the directories as this process sees them."""
    found = [f"{path} is not there" for path in asked.readable if not Path(path).exists()]
    found += [trouble for path in asked.writable if (trouble := unwritable(Path(path)))]
    if asked.shared is not None:
        path, content = asked.shared
        try:
            same = Path(path).read_text() == content
        except OSError:
            same = False
        if not same:
            found.append(f"{Path(path).parent} is not the driver's directory: it must be one shared volume")
    return found


def unset(asked: Questions) -> list[str]:
    """Variables that this process lacks."""
    return [name for name in asked.variables if not os.environ.get(name)]


_TRY_BYTES = 1 << 20


def unwritable(directory: Path) -> str:
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
