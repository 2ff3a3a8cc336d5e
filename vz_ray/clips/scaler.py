"""How many decode actors there should be. Pure: no actors, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.clips import ClipsConfig


@dataclass(slots=True)
class Scaler:
    """Grows while requests queue up, shrinks while actors idle, and waits before it believes either.

    Attributes:
        config: Bounds, queue length and patience.
        behind_since: Since when requests queue up; None while they do not.
        idle_since: Since when fewer actors would do; None while they would not.
    """

    config: ClipsConfig
    behind_since: float | None = None
    idle_since: float | None = None

    def target(self, now_s: float, actors: int, requests: int) -> int:
        """How many actors there should be.

        Args:
            now_s: Time on any clock that never goes back.
            actors: Serving now, or starting.
            requests: Asked of them and not answered yet.
        """
        config = self.config
        behind = requests > actors * config.queue
        # Fewer would do if they had at most half the queue that calls for more, so that it does not swing.
        idle = actors > config.actors and 2 * requests <= (actors - 1) * config.queue
        self.behind_since = (
            (self.behind_since if self.behind_since is not None else now_s) if behind else None
        )
        self.idle_since = (self.idle_since if self.idle_since is not None else now_s) if idle else None
        if self.behind_since is not None and now_s - self.behind_since >= config.grow_s:
            self.behind_since = None
            return max(actors, min(config.most_actors, -(-requests // config.queue)))
        if self.idle_since is not None and now_s - self.idle_since >= config.shrink_s:
            self.idle_since = now_s
            return actors - 1
        return actors


def _since(before: float | None, now_s: float, holds: bool) -> float | None:
    """Since when something has held without a break."""
    if not holds:
        return None
    return now_s if before is None else before
