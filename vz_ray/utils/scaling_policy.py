"""Autoscaling decision from count and load. Pure: no actors, no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ScalingPolicy:
    """Scales up after sustained overload and down after sustained underload.

    Attributes:
        min_count: Minimum count; 0 allows scaling to zero.
        max_load_each: Load per unit that triggers scaling up.
        upscale_delay_s: Time of sustained overload before scaling up.
        downscale_delay_s: Time of sustained underload before scaling down by one.
        overloaded_since: Start of the current overload; None if not overloaded.
        idle_since: Start of the current underload; None if not underloaded.
    """

    min_count: int
    max_count: int
    max_load_each: int
    upscale_delay_s: float
    downscale_delay_s: float
    overloaded_since: float | None = None
    idle_since: float | None = None

    def target_count(self, now_s: float, count: int, load: int) -> int:
        """Return the desired count.

        Args:
            now_s: Time of a monotonic clock.
            count: Running and starting units.
            load: Running and queued work items.
        """
        overloaded = load > count * self.max_load_each
        # Half of the upscale threshold, to avoid oscillation.
        idle = count > self.min_count and 2 * load <= (count - 1) * self.max_load_each
        self.overloaded_since = _update_since(self.overloaded_since, now_s, overloaded)
        self.idle_since = _update_since(self.idle_since, now_s, idle)
        if self.overloaded_since is not None and now_s - self.overloaded_since >= self.upscale_delay_s:
            self.overloaded_since = None
            return max(count, min(self.max_count, -(-load // self.max_load_each)))
        if self.idle_since is not None and now_s - self.idle_since >= self.downscale_delay_s:
            self.idle_since = now_s
            return count - 1
        return count


def _update_since(since: float | None, now_s: float, condition: bool) -> float | None:
    """Return the start of the period in which `condition` holds."""
    if not condition:
        return None
    return now_s if since is None else since
