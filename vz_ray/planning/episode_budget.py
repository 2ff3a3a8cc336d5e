"""Tokens, frames and patches of an episode: the maximum, and a typical one."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.episode import EpisodeConfig
from vz_ray.families import VisionShape

PROMPT_TOKENS = 450
"""Assumed tokens of system prompt, question and choices with conf/prompt/zoom.yaml."""
FRAME_LABEL_TOKENS = 16
"""Assumed tokens of a frame's number, its time (one token per digit) and the vision start and end tokens."""
CLIP_TEXT_TOKENS = 60
"""Assumed tokens of the text around the frames of a zoom."""
TYPICAL_ASPECT_RATIO = 16 / 9


@dataclass(frozen=True, slots=True)
class FrameBudget:
    """Size of one frame.

    Attributes:
        rows: Rows of patches.
        columns: Columns of patches.
        tokens: Visual tokens.
    """

    rows: int
    columns: int
    tokens: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @classmethod
    def largest(cls, config: EpisodeConfig, vision: VisionShape) -> FrameBudget:
        """Return the frame of the largest allowed area, with an aspect ratio as close to 16:9 as possible.

        Raises:
            ValueError: `max_pixels` is less than one visual token.
        """
        max_tokens = config.max_pixels // vision.token_side**2
        if max_tokens < 1:
            raise ValueError(f"episode.max_pixels is {config.max_pixels}; it must hold at least one visual token")
        sizes = [(rows, max_tokens // rows) for rows in range(1, max_tokens + 1)]
        area = max(rows * columns for rows, columns in sizes if columns <= 4 * rows and rows <= 4 * columns)
        candidates = [(rows, columns) for rows, columns in sizes if rows * columns == area]
        rows, columns = min(candidates, key=lambda size: abs(size[1] / size[0] - TYPICAL_ASPECT_RATIO))
        return cls(rows * vision.merge_size, columns * vision.merge_size, area)


@dataclass(frozen=True, slots=True)
class EpisodeBudget:
    """Tokens of one episode.

    Attributes:
        frame: Size of each frame.
        overview_frames: Frames before the first turn.
        zoom_frames: Frames of all zooms.
        prefix_tokens: Tokens before the first turn, shared by the samples of a group.
        sampled_tokens: Sampled tokens of all turns.
        tokens: Total tokens, truncated to the context.
        untruncated_tokens: Total tokens without truncation.
    """

    frame: FrameBudget
    overview_frames: int
    zoom_frames: int
    prefix_tokens: int
    sampled_tokens: int
    tokens: int
    untruncated_tokens: int

    @property
    def frames(self) -> int:
        return self.overview_frames + self.zoom_frames

    @property
    def branch_tokens(self) -> int:
        """Tokens after the shared prefix."""
        return self.tokens - self.prefix_tokens

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame with its label."""
        return self.frame.tokens + FRAME_LABEL_TOKENS


def episode_budget(config: EpisodeConfig, vision: VisionShape, *, zooms: int, turn_tokens: int) -> EpisodeBudget:
    """Return the budget of an episode with `zooms` clips of maximum size and `turn_tokens` per turn.

    Raises:
        ValueError: The overview fills the context.
    """
    frame = FrameBudget.largest(config, vision)
    tokens_per_frame = frame.tokens + FRAME_LABEL_TOKENS
    zooms = min(zooms, config.max_rounds - 1)
    overview_frames = min(config.overview_frames, config.max_images)
    zoom_frames = min(zooms * config.max_zoom_frames, config.max_images - overview_frames)
    prefix = min(PROMPT_TOKENS, config.max_context // 8) + overview_frames * tokens_per_frame
    if prefix >= config.max_context:
        raise ValueError(
            f"the overview's {overview_frames} frames take about {prefix:,} tokens; episode.max_context is "
            f"{config.max_context:,}. Lower episode.overview_frames or episode.max_pixels"
        )
    sampled = (zooms + 1) * min(turn_tokens, config.max_turn_tokens)
    untruncated = prefix + zoom_frames * tokens_per_frame + zooms * CLIP_TEXT_TOKENS + sampled
    return EpisodeBudget(
        frame=frame,
        overview_frames=overview_frames,
        zoom_frames=zoom_frames,
        prefix_tokens=prefix,
        sampled_tokens=min(sampled, config.max_context - prefix),
        tokens=min(untruncated, config.max_context),
        untruncated_tokens=untruncated,
    )


def longest_episode(config: EpisodeConfig, vision: VisionShape) -> EpisodeBudget:
    """Return the budget with the maximum number of zooms, frames and sampled tokens."""
    return episode_budget(config, vision, zooms=config.max_rounds - 1, turn_tokens=config.max_turn_tokens)
