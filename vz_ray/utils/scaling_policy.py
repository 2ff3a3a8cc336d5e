"""How many of something there should be for a load that comes and goes. Pure: no actors, no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ScalingPolicy:
    """Grows while the load is too much, shrinks while fewer would do, and waits before it believes either.

    Attributes:
        min_count: There are never fewer; 0 lets all go when there is nothing to do.
        max_count: There are never more.
        max_load_each: Load above which one is too much for each.
        upscale_delay_s: Seconds that the load must have been too much.
        downscale_delay_s: Seconds that fewer must have done.
        overloaded_since: Since when the load is too much; None while it is not.
        idle_since: Since when fewer would do; None while they would not.
    """

    min_count: int
    max_count: int
    max_load_each: int
    upscale_delay_s: float
    downscale_delay_s: float
    overloaded_since: float | None = None
    idle_since: float | None = None

    def target_count(self, now_s: float, count: int, load: int) -> int:
        """How many there should be.

        Args:
            now_s: Time on any clock that never goes back.
            count: Those there are, and those that are starting.
            load: What they have to do, and what waits for them.
        """
        behind = load > count * self.max_load_each
        # Fewer would do if they had at most half of what calls for more, so that it does not swing.
        idle = count > self.min_count and 2 * load <= (count - 1) * self.max_load_each
        self.overloaded_since = _since(self.overloaded_since, now_s, behind)
        self.idle_since = _since(self.idle_since, now_s, idle)
        if self.overloaded_since is not None and now_s - self.overloaded_since >= self.upscale_delay_s:
            self.overloaded_since = None
            return max(count, min(self.max_count, -(-load // self.max_load_each)))
        if self.idle_since is not None and now_s - self.idle_since >= self.downscale_delay_s:
            self.idle_since = now_s
            return count - 1
        return count


def _since(before: float | None, now_s: float, holds: bool) -> float | None:
    """Since when something has held without a break."""
    if not holds:
        return None
    return now_s if before is None else before
