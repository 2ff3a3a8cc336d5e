"""Numbers as a person says them."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """`75` as `1 min 15 s`; tenths below a minute."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
