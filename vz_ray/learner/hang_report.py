"""Where a learner rank is, and how it is asked what it is doing when it is late.

A rank does one thing at a time and may be stuck in C code, such as a collective:
a call would not reach it. A task on its node signals it instead.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vz_ray.utils.stack_dump import StackDumper, dump_stacks
from vz_ray.utils.timeouts import with_timeout

_ANSWER_S = 30.0
"""A node that is busy may need most of it to start a process for the task."""


def actor_name(rank: int) -> str:
    """What a rank is called in errors and logs."""
    return f"learner-rank-{rank}"


@dataclass(frozen=True, slots=True)
class HangReporter:
    """Attributes:
    node_id: Ray's id of a rank's node.
    process: Its process there.
    """

    node_id: str
    process: StackDumper

    async def report(self, who: str) -> tuple[str, str]:
        """What `who`, the rank, is doing, in a few words, and its stacks; asked by a task on its node.

        Raises:
            Silent: It does not say.
            Overdue: The task did not come back within 30 s.
        """
        here = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(dump_stacks)
        try:
            asked: Awaitable[tuple[str, str]] = task.remote(self.process)
            return await with_timeout(asked, _ANSWER_S, target=f"the node of {who}", operation="a look at it")
        except RayTaskError as error:
            raise error.cause from error
