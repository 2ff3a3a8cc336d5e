"""Completed turns of running episodes, so that another worker can continue them."""

from __future__ import annotations

import pickle
from collections.abc import Callable

from vz_ray.env.events import EpisodeEvent, EpisodeStarted, TurnCompleted
from vz_ray.env.trajectory import EpisodeId, Turn


class TurnLog:
    """Turns by episode. They hold tokens and references to frames, no pixels.

    Turns leave as bytes: the driver stores them, and reads them only if it has lost the worker.
    """

    def __init__(self) -> None:
        self._turns: dict[EpisodeId, list[Turn]] = {}
        self._changed: set[EpisodeId] = set()

    def recorder(self, episode_id: EpisodeId) -> Callable[[EpisodeEvent], None]:
        """Return the event callback of an episode. A new start deletes its turns."""

        def record(event: EpisodeEvent) -> None:
            if isinstance(event, EpisodeStarted):
                self._turns[episode_id] = []
            # The last turn has no observation: the episode ends with it.
            elif isinstance(event, TurnCompleted) and event.turn.observation is not None:
                self._turns.setdefault(episode_id, []).append(event.turn)
                self._changed.add(episode_id)

        return record

    def discard(self, episode_id: EpisodeId) -> None:
        """Forget an episode that has ended."""
        self._turns.pop(episode_id, None)
        self._changed.discard(episode_id)

    def take_changed(self) -> dict[EpisodeId, bytes]:
        """Return all turns of each episode that completed one since the last call."""
        changed, self._changed = self._changed, set()
        return {episode_id: pickle.dumps(tuple(self._turns[episode_id])) for episode_id in changed}

    @staticmethod
    def decode(turns: bytes) -> tuple[Turn, ...]:
        """Return the turns of `take_changed`; none for empty bytes."""
        return pickle.loads(turns) if turns else ()
