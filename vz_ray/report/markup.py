"""HTML from values; every text that came from outside goes through `escape`."""

from __future__ import annotations

import html
from importlib.resources import files

from vz_ray.web import load_asset


def escape(value: object) -> str:
    """Escaped for element content and quoted attributes."""
    return html.escape(str(value), quote=True)


def format_percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def format_number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def format_clock(seconds: float) -> str:
    """`75.5` as `1:15.5`; tenths only where there are some. A refused zoom may begin at `-0:05`."""
    if seconds < 0:
        return f"-{format_clock(-seconds)}"
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    tail = f"{rest:04.1f}".removesuffix(".0")
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def stage_title(stage: str) -> str:
    """A stage's name for people."""
    if stage.startswith("uniform_"):
        return f"Uniform, {stage.removeprefix('uniform_')} frames"
    known = {"cold_start": "After cold start", "sft_continued": "SFT continued", "rl": "After RL"}
    return known.get(stage, stage.replace("_", " ").capitalize())


def report_css() -> str:
    """The CSS of every report; a page holds it, so that it is one file."""
    return load_asset("base.css") + files("vz_ray.report").joinpath("report.css").read_text(encoding="utf-8")
