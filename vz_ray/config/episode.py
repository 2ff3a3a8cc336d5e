"""Config of an episode: turns, frames, tokens, chat format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vz_ray.config.fields import Section, check_at_most, choice, number
from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.config.zoom_gate import ZoomGateConfig


@dataclass
class EpisodeConfig(Section):
    """Limits and prompts of an episode; the defaults are the paper's."""

    chat_format: str = choice("clean", "compat")
    """`clean`: the model's own chat template; `compat`: the exact bytes of the released weights' training."""
    thinking: str = choice("auto", "on", "off")
    """Reasoning block in the chat template (`enable_thinking`): `on` opens `<think>` at each turn, `off` does not,
    `auto` is the template's default."""
    prompt: str = "conf/prompt/zoom.yaml"
    """File with the text of prompts, replies and errors."""
    max_rounds: int = number(5, minimum=1)
    """Turns of the policy; the last one must answer. 1 allows no zoom."""
    max_zoom_frames: int = number(16, minimum=1)
    """Maximum frames of one zoom."""
    zoom_fps: float = number(0.0, minimum=0)
    """Frame rate of every zoom, limited by `max_zoom_frames`; 0 uses the rate that the policy requests."""
    max_images: int = number(128, minimum=1)
    """Maximum images of an episode, including the overview."""
    max_turn_tokens: int = number(4096, minimum=1)
    """Maximum generated tokens of one turn."""
    max_context: int = number(32768, minimum=1)
    """Maximum tokens of an episode, including visual tokens."""
    overview_fps: float = number(0.5, above=0)
    """Frame rate of the overview."""
    overview_frames: int = number(64, minimum=1)
    """Maximum frames of the overview; longer videos are sampled evenly."""
    overview_spread: str = choice("starts", "endpoints")
    """Times of evenly sampled frames: `starts` (k / n of the duration) or `endpoints` (first to last
    frame)."""
    selector: FrameSelectorConfig = field(default_factory=FrameSelectorConfig)
    """Selection of the overview's frames."""
    gate: ZoomGateConfig = field(default_factory=ZoomGateConfig)
    """Zoom only if a draft answer is uncertain."""
    min_pixels: int = number(25088, above=0)
    """Minimum area of a frame in pixels; for Qwen3-VL and Qwen3.5 at least 65536, the minimum of their image
    processor."""
    max_pixels: int = number(100352, minimum=1)
    """Maximum area of a frame in pixels. The default is 128 visual tokens of Qwen2.5-VL (28 x 28 pixels); with
    those of Qwen3-VL and Qwen3.5 (32 x 32) it is 98, and 131072 is 128."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_most(self, "overview_frames", "max_images")
        check_at_most(self, "min_pixels", "max_pixels")


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
