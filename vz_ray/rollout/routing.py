"""Which worker gets the next group. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from vz_ray.rollout.engine_stats import WorkerCapacity

_WEIGHT = 0.05
"""Of the newest episode in the running mean of their lengths."""


class RoutingCandidate(Protocol):
    """A worker with a free place. `load` counts episodes that it plays or is to play."""

    load: int

    @property
    def capacity(self) -> WorkerCapacity | None: ...


C = TypeVar("C", bound=RoutingCandidate)


class WorkerRouter:
    """Chooses the worker with the most free key/value cache.

    What a worker said last is corrected by what it has been given since: episodes that it did not play
    then are taken to be as long as others were. Where a worker has said nothing yet, and before the first
    episode has ended, the one with the fewest episodes is chosen.
    """

    def __init__(self) -> None:
        self._episode_tokens = 0.0

    def record_episode(self, tokens: int) -> None:
        """An episode of so many tokens has been played."""
        old = self._episode_tokens
        self._episode_tokens = old + _WEIGHT * (tokens - old) if old else float(tokens)

    def choose(self, candidates: Sequence[C]) -> C:
        """The one to give the next group to; of equals, the one with less to do, then the first."""
        if not self._episode_tokens or any(candidate.capacity is None for candidate in candidates):
            return min(candidates, key=lambda candidate: candidate.load)
        return max(candidates, key=lambda candidate: (self._estimate_free_tokens(candidate), -candidate.load))

    def _estimate_free_tokens(self, candidate: RoutingCandidate) -> float:
        room = candidate.capacity
        assert room is not None
        return room.free_tokens - (candidate.load - room.running_episodes) * self._episode_tokens
