"""Config of the HTML report."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.fields import Section, number
from vz_ray.config.timeouts import timeout


@dataclass
class ReportConfig(Section):
    """Contents of the report."""

    max_episodes: int = number(8, minimum=0)
    """Maximum episodes that are shown with frames."""
    max_frames: int = number(64, minimum=1)
    """Maximum thumbnails per overview or zoom; more frames are sampled evenly."""
    max_thumbnail_px: int = number(160, minimum=1)
    """Maximum side of a thumbnail in pixels; smaller frames keep their size."""
    timeout_s: float = timeout("report_frames_s")
    """Timeout of decoding one episode's frames."""
