"""Configuration of the HTML report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ReportConfig:
    """What the report shows.

    Attributes:
        episodes: Episodes drawn with their frames.
        frames: Most thumbnails per overview or zoom; more are thinned evenly.
        thumbnail_px: Longest side of an embedded thumbnail; smaller frames are
            embedded as they are.
        deadline_s: Seconds that the frames of one episode may take to decode;
            then the report goes without them.
    """

    episodes: int = 8
    frames: int = 64
    thumbnail_px: int = 160
    deadline_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("frames", "thumbnail_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"report.{name} is {getattr(self, name)}; it must be at least 1")
        if self.episodes < 0:
            raise ValueError(f"report.episodes is {self.episodes}; it must not be negative")
        if self.deadline_s <= 0:
            raise ValueError(f"report.deadline_s is {self.deadline_s}; it must be positive")
