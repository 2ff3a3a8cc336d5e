"""Inspection of a learner rank that does not answer in time.

A rank runs one call at a time and can be stuck in C code, such as a collective, so another actor call would
not reach it. A Ray task on the rank's node sends it a signal instead and reads the stacks that it writes.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vz_ray.utils.stack_dump import StackDumper, dump_stacks
from vz_ray.utils.timeouts import with_timeout

_REPORT_TIMEOUT_S = 30.0
"""A busy node can need most of this time to start a process for the task."""


def actor_name(rank: int) -> str:
    """Return the name of a rank in errors and logs."""
    return f"learner-rank-{rank}"


@dataclass(frozen=True, slots=True)
class HangReporter:
    """Location of a rank's process.

    Attributes:
        node_id: Ray's id of the node.
        process: Stack dumper of the process.
    """

    node_id: str
    process: StackDumper

    async def report(self, name: str) -> tuple[str, str]:
        """Return the current function of the rank `name`, and the stacks of its threads.

        Raises:
            StackDumpError: The process is gone or wrote no stacks.
            StepTimeout: The task did not finish within 30 s.
        """
        on_node = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(dump_stacks)
        try:
            result: Awaitable[tuple[str, str]] = task.remote(self.process)
            return await with_timeout(result, _REPORT_TIMEOUT_S, target=f"the node of {name}", operation="a stack dump")
        except RayTaskError as error:
            raise error.cause from error
