"""Configuration of the HTML report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ReportConfig:
    """What the report shows.

    Attributes:
        max_episodes: Episodes drawn with their frames.
        max_frames: Most thumbnails per overview or zoom; more are thinned evenly.
        max_thumbnail_px: Longest side of an embedded thumbnail; smaller frames are
            embedded as they are.
        timeout_s: Seconds that the frames of one episode may take to decode;
            then the report goes without them.
    """

    max_episodes: int = 8
    max_frames: int = 64
    max_thumbnail_px: int = 160
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("max_frames", "max_thumbnail_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"report.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_episodes < 0:
            raise ValueError(f"report.max_episodes is {self.max_episodes}; it must not be negative")
        if self.timeout_s <= 0:
            raise ValueError(f"report.timeout_s is {self.timeout_s}; it must be positive")
