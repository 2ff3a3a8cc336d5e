"""Optional costs: of saying much, and of looking at many frames. Both are off by default."""

from __future__ import annotations


def length_penalty(tokens: int, free_tokens: int, max_tokens: int) -> float:
    """0 up to `free_tokens` tokens, -1 from `max_tokens` on, evenly in between (DAPO's soft over-long punishment).

    Args:
        tokens: Tokens that the policy said in the episode, over all its turns.
        free_tokens: Tokens without penalty.
        max_tokens: Tokens at which the penalty is whole; above `free_tokens`.
    """
    return -min(1.0, max(0, tokens - free_tokens) / (max_tokens - free_tokens))


def frame_cost(frames: int, max_frames: int) -> float:
    """0 without zooms, -1 from `max_frames` frames on, evenly in between.

    Args:
        frames: Frames that zooms showed; the overview is not the policy's choice.
        max_frames: Frames at which the cost is whole.
    """
    return -min(1.0, frames / max_frames)
