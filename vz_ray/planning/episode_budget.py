"""How many tokens, frames and patches an episode has: at most, and as it usually goes."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.episode import EpisodeConfig
from vz_ray.planning.model_shape import VisionShape

PROMPT_TOKENS = 450
"""Assumed of system prompt, question and choices in the wording of conf/prompt/zoom.yaml."""
FRAME_LABEL_TOKENS = 16
"""Assumed of what stands beside a frame: its number and time, digit by digit, and start and end of vision."""
CLIP_TEXT_TOKENS = 60
"""Assumed of the wording around the frames of a zoom."""
ASPECT = 16 / 9


@dataclass(frozen=True, slots=True)
class FrameBudget:
    """A frame of the largest area that the config allows, as near to 16:9 as such an area can be.

    Attributes:
        rows: Patches down.
        columns: Patches across.
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
        """Raises ValueError where `max_pixels` has no room for one visual token."""
        units = config.max_pixels // (vision.patch_size * vision.merge_size) ** 2
        if units < 1:
            raise ValueError(f"episode.max_pixels is {config.max_pixels}, less than one visual token")
        sizes = [(rows, units // rows) for rows in range(1, units + 1)]
        area = max(rows * columns for rows, columns in sizes if columns <= 4 * rows and rows <= 4 * columns)
        fitting = [(r, c) for r, c in sizes if r * c == area]
        rows, columns = min(fitting, key=lambda size: abs(size[1] / size[0] - ASPECT))
        return cls(rows * vision.merge_size, columns * vision.merge_size, area)


@dataclass(frozen=True, slots=True)
class EpisodeBudget:
    """Tokens of one episode.

    Attributes:
        frame: Its frames.
        overview_frames: Frames before the first turn.
        zoom_frames: Frames of all zooms.
        prefix_tokens: Tokens before the first turn: the same for all samples of a task.
        sampled_tokens: Tokens of all turns.
        tokens: All of them, cut to the context.
        untruncated_tokens: Before the cut.
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
        """Tokens after the prefix: each sample's own."""
        return self.tokens - self.prefix_tokens

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame with its label."""
        return self.frame.tokens + FRAME_LABEL_TOKENS


def episode_budget(
    config: EpisodeConfig, vision: VisionShape, *, zooms: int, turn_tokens: int
) -> EpisodeBudget:
    """Of an episode with so many zooms, each of as many frames as allowed, and turns of so many tokens.

    Raises:
        ValueError: The overview alone fills the context.
    """
    frame = FrameBudget.largest(config, vision)
    slot = frame.tokens + FRAME_LABEL_TOKENS
    zooms = min(zooms, config.max_rounds - 1)
    overview = min(config.overview_frames, config.max_images)
    shown = min(zooms * config.max_zoom_frames, config.max_images - overview)
    prompt = min(PROMPT_TOKENS, config.max_context // 8)
    prefix = prompt + overview * slot
    if prefix >= config.max_context:
        raise ValueError(
            f"the overview's {overview} frames make about {prefix:,} tokens, and episode.max_context is "
            f"{config.max_context:,}; lower episode.overview_frames or episode.max_pixels"
        )
    sampled = (zooms + 1) * min(turn_tokens, config.max_turn_tokens)
    uncut = prefix + shown * slot + zooms * CLIP_TEXT_TOKENS + sampled
    return EpisodeBudget(
        frame=frame,
        overview_frames=overview,
        zoom_frames=shown,
        prefix_tokens=prefix,
        sampled_tokens=min(sampled, config.max_context - prefix),
        tokens=min(uncut, config.max_context),
        untruncated_tokens=uncut,
    )


def longest_episode(config: EpisodeConfig, vision: VisionShape) -> EpisodeBudget:
    """As many zooms, frames and sampled tokens as the config allows."""
    return episode_budget(config, vision, zooms=config.max_rounds - 1, turn_tokens=config.max_turn_tokens)
