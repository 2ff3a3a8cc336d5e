"""HTML and text formatting for reports. All external text must pass through `escape`."""

from __future__ import annotations

import html
from importlib.resources import files

from vz_ray.web import load_asset


def escape(value: object) -> str:
    """Escape for element content and quoted attributes."""
    return html.escape(str(value), quote=True)


def format_percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def format_number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def format_clock(seconds: float) -> str:
    """Format `75.5` as `1:15.5`, without zero tenths. A rejected zoom may start at `-0:05`."""
    if seconds < 0:
        return f"-{format_clock(-seconds)}"
    minutes, remainder = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    tail = f"{remainder:04.1f}".removesuffix(".0")
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def stage_title(stage: str) -> str:
    """Return the display name of a stage."""
    if stage.startswith("uniform_"):
        return f"Uniform, {stage.removeprefix('uniform_')} frames"
    titles = {"cold_start": "After cold start", "sft_continued": "SFT continued", "rl": "After RL"}
    return titles.get(stage, stage.replace("_", " ").capitalize())


def report_css() -> str:
    """Return the CSS that every report embeds."""
    return load_asset("base.css") + files("vz_ray.report").joinpath("report.css").read_text(encoding="utf-8")
