"""Which worker gets the next group. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from vz_ray.rollout.engine_stats import Room

_WEIGHT = 0.05
"""Of the newest episode in the running mean of their lengths."""


class Candidate(Protocol):
    """A worker with a free place. `load` counts episodes that it plays or is to play."""

    load: int

    @property
    def room(self) -> Room | None: ...


C = TypeVar("C", bound=Candidate)


class Admission:
    """Chooses the worker with the most free key/value cache.

    What a worker said last is corrected by what it has been given since: episodes that it did not play
    then are taken to be as long as others were. Where a worker has said nothing yet, and before the first
    episode has ended, the one with the fewest episodes is chosen.
    """

    def __init__(self) -> None:
        self._episode_tokens = 0.0

    def ended(self, tokens: int) -> None:
        """An episode of so many tokens has been played."""
        old = self._episode_tokens
        self._episode_tokens = old + _WEIGHT * (tokens - old) if old else float(tokens)

    def choose(self, candidates: Sequence[C]) -> C:
        """The one to give the next group to; of equals, the one with less to do, then the first."""
        if not self._episode_tokens or any(candidate.room is None for candidate in candidates):
            return min(candidates, key=lambda candidate: candidate.load)
        return max(candidates, key=lambda candidate: (self._free(candidate), -candidate.load))

    def _free(self, candidate: Candidate) -> float:
        room = candidate.room
        assert room is not None
        return room.free_tokens - (candidate.load - room.playing) * self._episode_tokens
