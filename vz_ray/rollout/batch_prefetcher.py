"""Prefetch batches while the learner trains on earlier ones, with bounded staleness.

    learner at step          i                       i + 1
    in flight        i, i + 1, ..., i + k    i + 1, ..., i + k + 1

The batch of step j starts after update j - k and is consumed after update j. No token is therefore
more than k updates old, by construction, and nothing is discarded to keep the bound. With k = 0,
rollout and training alternate.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

from vz_ray.env.trajectory import Group, SampledAction
from vz_ray.rollout.batch_collector import RolloutBatch


class BatchPrefetcher:
    """Start batches as early as the staleness bound allows. Cancel them when the context exits.

    Args:
        collect: Collects the batch of a step.
        max_staleness: The bound k: maximum number of updates that a token may be behind.
        max_steps: Number of steps of the run.
    """

    def __init__(self, collect: Callable[[int], Awaitable[RolloutBatch]], max_staleness: int, max_steps: int) -> None:
        self._collect, self._max_staleness, self._max_steps = collect, max_staleness, max_steps
        self._in_flight: dict[int, asyncio.Future[RolloutBatch]] = {}

    async def __aenter__(self) -> BatchPrefetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    async def get_batch(self, step: int) -> RolloutBatch:
        """Return the batch of `step` and start later ones.

        Call it when the engines hold the weights of `step`.
        """
        for next_step in range(step, min(step + self._max_staleness + 1, self._max_steps)):
            if next_step not in self._in_flight:
                self._in_flight[next_step] = asyncio.ensure_future(self._collect(next_step))
        batch = await self._in_flight[step]
        del self._in_flight[step]
        return batch

    async def cancel(self) -> None:
        """Cancel all batches in flight and wait until they have ended."""
        for batch in self._in_flight.values():
            batch.cancel()
        await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        self._in_flight.clear()


def staleness_histogram(groups: Iterable[Group], current_version: int) -> dict[int, int]:
    """Count sampled tokens by the number of updates between their weights and `current_version`."""
    counts: Counter[int] = Counter()
    for group in groups:
        for trajectory in group.trajectories:
            for turn in trajectory.turns:
                if isinstance(turn.action, SampledAction):
                    for span in turn.action.versions:
                        counts[current_version - span.version] += span.end - span.start
    return dict(sorted(counts.items()))
