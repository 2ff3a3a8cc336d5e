"""Config of the HTML report."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.derived import timeout
from vz_ray.config.validation import check_min


@dataclass
class ReportConfig:
    """Contents of the report."""

    max_episodes: int = 8
    """Maximum episodes that are shown with frames."""
    max_frames: int = 64
    """Maximum thumbnails per overview or zoom; more frames are sampled evenly."""
    max_thumbnail_px: int = 160
    """Maximum side of a thumbnail in pixels; smaller frames keep their size."""
    timeout_s: float = timeout("report_frames_s")
    """Timeout of decoding one episode's frames."""

    def __post_init__(self) -> None:
        check_min(self, 1, "max_frames", "max_thumbnail_px")
        check_min(self, 0, "max_episodes")
