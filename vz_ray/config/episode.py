"""Config of an episode: turns, frames, tokens, chat format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.config.validation import (
    InvalidValueError,
    check_choice,
    check_min,
    check_not_negative,
    check_positive,
)
from vz_ray.config.zoom_gate import ZoomGateConfig

CHAT_FORMATS = ("clean", "compat")
OVERVIEW_SPREADS = ("starts", "endpoints")


@dataclass
class EpisodeConfig:
    """Limits and prompts of an episode; the defaults are the paper's."""

    chat_format: str = "clean"
    """`clean`: the model's own chat template; `compat`: the exact bytes of the released weights' training."""
    prompt: str = "conf/prompt/zoom.yaml"
    """File with the text of prompts, replies and errors."""
    max_rounds: int = 5
    """Turns of the policy; the last one must answer. 1 allows no zoom."""
    max_zoom_frames: int = 16
    """Maximum frames of one zoom."""
    zoom_fps: float = 0.0
    """Frame rate of every zoom, limited by `max_zoom_frames`; 0 uses the rate that the policy requests."""
    max_images: int = 128
    """Maximum images of an episode, including the overview."""
    max_turn_tokens: int = 4096
    """Maximum generated tokens of one turn."""
    max_context: int = 32768
    """Maximum tokens of an episode, including visual tokens."""
    overview_fps: float = 0.5
    """Frame rate of the overview."""
    overview_frames: int = 64
    """Maximum frames of the overview; longer videos are sampled evenly."""
    overview_spread: str = "starts"
    """Times of evenly sampled frames: `starts` (k / n of the duration) or `endpoints` (first to last
    frame)."""
    selector: FrameSelectorConfig = field(default_factory=FrameSelectorConfig)
    """Selection of the overview's frames."""
    gate: ZoomGateConfig = field(default_factory=ZoomGateConfig)
    """Zoom only if a draft answer is uncertain."""
    min_pixels: int = 25088
    """Minimum area of a frame in pixels."""
    max_pixels: int = 100352
    """Maximum area of a frame in pixels; the default is 128 visual tokens of 28 x 28."""

    def __post_init__(self) -> None:
        check_choice(self, "chat_format", CHAT_FORMATS)
        check_choice(self, "overview_spread", OVERVIEW_SPREADS)
        check_min(self, 1, "max_rounds", "max_zoom_frames", "max_images", "max_turn_tokens", "overview_frames")
        check_positive(self, "overview_fps", "min_pixels")
        check_not_negative(self, "zoom_fps")
        if self.overview_frames > self.max_images:
            raise InvalidValueError(
                "overview_frames",
                f"is {self.overview_frames}; it must be at most max_images ({self.max_images})",
                "max_images",
            )
        if self.min_pixels > self.max_pixels:
            raise InvalidValueError(
                "min_pixels",
                f"is {self.min_pixels}; it must be at most max_pixels ({self.max_pixels})",
                "max_pixels",
            )


def uniform_frames_config(config: EpisodeConfig, frames: int) -> EpisodeConfig:
    """Return `config` for a model that answers in one turn from `frames` uniform frames."""
    return replace(
        config,
        max_rounds=1,
        max_images=max(frames, config.max_images),
        overview_fps=1e6,
        overview_frames=frames,
        selector=FrameSelectorConfig(),
        gate=ZoomGateConfig(),
    )
