"""Batches that are played while the learner is still at work on earlier ones, never too early.

    learner at iteration          i                       i + 1
    under way         i, i + 1, ..., i + k    i + 1, ..., i + k + 1

The batch of iteration j begins once the weights have j - k updates, and is
learned from when they have j. So no token is ever more than k updates old, by
construction: nothing has to be thrown away to keep the bound. With k = 0
engines and learner take turns.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

from vz_ray.env.trajectory import Group, SampledAction
from vz_ray.rollout.batch_collector import RolloutBatch


class BatchPrefetcher:
    """Starts batches as early as the bound allows; what is under way ends with the block.

    Args:
        play: Plays the batch of an iteration.
        most: The bound k: updates that a token may be behind.
        end: Iterations of the run.
    """

    def __init__(
        self, collect: Callable[[int], Awaitable[RolloutBatch]], max_staleness: int, max_steps: int
    ) -> None:
        self._collect, self._max_staleness, self._max_steps = collect, max_staleness, max_steps
        self._in_flight: dict[int, asyncio.Future[RolloutBatch]] = {}

    async def __aenter__(self) -> BatchPrefetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    async def get_batch(self, step: int) -> RolloutBatch:
        """The batch of `step`, to be called when the engines hold its weights; starts later ones."""
        for coming in range(step, min(step + self._max_staleness + 1, self._max_steps)):
            if coming not in self._in_flight:
                self._in_flight[coming] = asyncio.ensure_future(self._collect(coming))
        batch = await self._in_flight[step]
        del self._in_flight[step]
        return batch

    async def cancel(self) -> None:
        """Ends what is under way; returns when nothing is."""
        for playing in self._in_flight.values():
            playing.cancel()
        await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        self._in_flight.clear()


def staleness_histogram(groups: Iterable[Group], current_version: int) -> dict[int, int]:
    """Sampled tokens by how many updates older than `current_version` the weights were that they came from."""
    found: Counter[int] = Counter()
    for group in groups:
        for trajectory in group.trajectories:
            for turn in trajectory.turns:
                if isinstance(turn.action, SampledAction):
                    for span in turn.action.versions:
                        found[current_version - span.version] += span.end - span.start
    return dict(sorted(found.items()))
