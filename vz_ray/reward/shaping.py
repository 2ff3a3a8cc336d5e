"""Optional costs: of saying much, and of looking at many frames. Both are off by default."""

from __future__ import annotations


def length_penalty(tokens: int, free: int, full: int) -> float:
    """0 up to `free` tokens, -1 from `full` on, evenly in between (DAPO's soft over-long punishment).

    Args:
        tokens: Tokens that the policy said in the episode, over all its turns.
        free: Tokens without penalty.
        full: Tokens at which the penalty is whole; above `free`.
    """
    return -min(1.0, max(0, tokens - free) / (full - free))


def frame_cost(frames: int, full: int) -> float:
    """0 without zooms, -1 from `full` frames on, evenly in between.

    Args:
        frames: Frames that zooms showed; the overview is not the policy's choice.
        full: Frames at which the cost is whole.
    """
    return -min(1.0, frames / full)
