"""What an episode may do: rounds, frames, tokens, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.config.zoom_gate import ZoomGateConfig

CHAT_FORMATS = ("clean", "compat")
OVERVIEW_SPREADS = ("starts", "endpoints")


@dataclass
class EpisodeConfig:
    """Limits and wording of an episode; the defaults are the paper's."""

    chat_format: str = "clean"
    """`clean`: the model's own chat template; `compat`: byte for byte what the released weights saw."""
    prompt: str = "conf/prompt/zoom.yaml"
    """File with the wording of prompt, replies and errors."""
    max_rounds: int = 5
    """Turns of the policy; one fewer zooms. 1 makes it a model that only answers."""
    max_zoom_frames: int = 16
    """Most frames in one zoom."""
    zoom_fps: float = 0.0
    """Frame rate of every zoom, whatever was asked for, cut to `max_zoom_frames`; 0 is what was asked for."""
    max_images: int = 128
    """Most images in an episode, overview included."""
    max_turn_tokens: int = 4096
    """Most tokens sampled in one turn."""
    max_context: int = 32768
    """Most tokens in an episode, visual ones included."""
    overview_fps: float = 0.5
    """Frame rate of the overview."""
    overview_frames: int = 64
    """Most frames in the overview; longer videos spread them evenly."""
    overview_spread: str = "starts"
    """Where spread frames lie: `starts` (k / n of the duration) or `endpoints` (first to last frame)."""
    selector: FrameSelectorConfig = field(default_factory=FrameSelectorConfig)
    """Which frames the overview shows."""
    gate: ZoomGateConfig = field(default_factory=ZoomGateConfig)
    """Whether episodes zoom only where their answer is uncertain."""
    min_pixels: int = 25088
    """Smallest area of a frame, pixels."""
    max_pixels: int = 100352
    """Largest area of a frame, pixels: 128 visual tokens of 28 x 28."""

    def __post_init__(self) -> None:
        if self.chat_format not in CHAT_FORMATS:
            raise ValueError(
                f"episode.chat_format is {self.chat_format!r}; it must be one of {', '.join(CHAT_FORMATS)}"
            )
        if self.overview_spread not in OVERVIEW_SPREADS:
            raise ValueError(
                f"episode.overview_spread is {self.overview_spread!r}; it must be one of {', '.join(OVERVIEW_SPREADS)}"
            )
        for name in ("max_rounds", "max_zoom_frames", "max_images", "max_turn_tokens", "overview_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"episode.{name} is {getattr(self, name)}; it must be at least 1")
        if self.overview_fps <= 0:
            raise ValueError(f"episode.overview_fps is {self.overview_fps}; it must be above 0")
        if not 0 <= self.zoom_fps < float("inf"):
            raise ValueError(
                f"episode.zoom_fps is {self.zoom_fps}; it must be a frame rate, or 0 for the one asked for"
            )
        if self.overview_frames > self.max_images:
            raise ValueError(
                f"episode.overview_frames is {self.overview_frames}, "
                f"above episode.max_images ({self.max_images})"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"episode.min_pixels is {self.min_pixels} and max_pixels {self.max_pixels}; "
                "they must be above 0 and in order"
            )


def uniform_frames_config(config: EpisodeConfig, frames: int) -> EpisodeConfig:
    """`config` for a model that is shown `frames` uniform frames and can only answer."""
    return replace(
        config,
        max_rounds=1,
        max_images=max(frames, config.max_images),
        overview_fps=1e6,
        overview_frames=frames,
        selector=FrameSelectorConfig(),
        gate=ZoomGateConfig(),
    )
