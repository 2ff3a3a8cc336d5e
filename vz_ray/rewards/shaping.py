"""Optional penalties for long episodes and for many zoom frames. Off by default."""

from __future__ import annotations


def length_penalty(tokens: int, free_tokens: int, max_tokens: int) -> float:
    """Return 0 up to `free_tokens`, -1 from `max_tokens`, and linear in between.

    This is the soft overlong punishment of DAPO.

    Args:
        tokens: Tokens that the policy generated in the episode, over all turns.
        free_tokens: Tokens without penalty.
        max_tokens: Tokens with the full penalty; above `free_tokens`.
    """
    return -min(1.0, max(0, tokens - free_tokens) / (max_tokens - free_tokens))


def frame_cost(frames: int, max_frames: int) -> float:
    """Return 0 without zooms, -1 from `max_frames`, and linear in between.

    Args:
        frames: Frames served for zooms. The overview does not count: the policy does not choose it.
        max_frames: Frames with the full cost.
    """
    return -min(1.0, frames / max_frames)
