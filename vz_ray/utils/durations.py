"""Formatting of durations."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Format `75` as `1 min 15 s`; below a minute with one decimal."""
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {remainder:02d} s" if minutes else f"{seconds:.1f} s"
