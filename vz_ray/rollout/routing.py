"""Choose the worker for the next group. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from vz_ray.rollout.engine_stats import WorkerCapacity

_EMA_WEIGHT = 0.05
"""Weight of the newest episode in the moving average of episode lengths."""


class RoutingCandidate(Protocol):
    """A worker with a free slot. `load` counts its queued and running episodes."""

    load: int

    @property
    def capacity(self) -> WorkerCapacity | None: ...


C = TypeVar("C", bound=RoutingCandidate)


class WorkerRouter:
    """Route each group to the worker with the most free key/value cache.

    The last reported capacity is corrected for episodes assigned since: each is assumed to have the
    average length. Before any worker has reported or any episode has finished, the worker with the
    fewest episodes is chosen.
    """

    def __init__(self) -> None:
        self._episode_tokens = 0.0

    def record_episode(self, tokens: int) -> None:
        """Update the average episode length."""
        average = self._episode_tokens
        self._episode_tokens = average + _EMA_WEIGHT * (tokens - average) if average else float(tokens)

    def choose(self, candidates: Sequence[C]) -> C:
        """Return the best candidate. Ties go to the lower load, then to the first."""
        if not self._episode_tokens or any(candidate.capacity is None for candidate in candidates):
            return min(candidates, key=lambda candidate: candidate.load)
        return max(candidates, key=lambda candidate: (self._estimate_free_tokens(candidate), -candidate.load))

    def _estimate_free_tokens(self, candidate: RoutingCandidate) -> float:
        capacity = candidate.capacity
        assert capacity is not None
        return capacity.free_tokens - (candidate.load - capacity.running_episodes) * self._episode_tokens
