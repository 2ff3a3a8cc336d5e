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

from vz_ray.episode.trajectory import Group, Sampled
from vz_ray.rollout.collect import Batch


class Ahead:
    """Starts batches as early as the bound allows; what is under way ends with the block.

    Args:
        play: Plays the batch of an iteration.
        most: The bound k: updates that a token may be behind.
        end: Iterations of the run.
    """

    def __init__(self, play: Callable[[int], Awaitable[Batch]], most: int, end: int) -> None:
        self._play, self._most, self._end = play, most, end
        self._playing: dict[int, asyncio.Future[Batch]] = {}

    async def __aenter__(self) -> Ahead:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.give_up()

    async def batch(self, iteration: int) -> Batch:
        """The batch of `iteration`, to be called when the engines hold its weights; starts later ones."""
        for coming in range(iteration, min(iteration + self._most + 1, self._end)):
            if coming not in self._playing:
                self._playing[coming] = asyncio.ensure_future(self._play(coming))
        batch = await self._playing[iteration]
        del self._playing[iteration]
        return batch

    async def give_up(self) -> None:
        """Ends what is under way; returns when nothing is."""
        for playing in self._playing.values():
            playing.cancel()
        await asyncio.gather(*self._playing.values(), return_exceptions=True)
        self._playing.clear()


def staleness(groups: Iterable[Group], version: int) -> dict[int, int]:
    """Sampled tokens by how many updates older than `version` the weights were that they came from."""
    found: Counter[int] = Counter()
    for group in groups:
        for trajectory in group.trajectories:
            for turn in trajectory.turns:
                if isinstance(turn.action, Sampled):
                    for span in turn.action.versions:
                        found[version - span.version] += span.end - span.start
    return dict(sorted(found.items()))
