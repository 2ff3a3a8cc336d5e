"""HTML elements and text formatting of reports.

All external text must pass through `escape`. Arguments named `body` are HTML; all other text is escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
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


def html_page(title: str, heading: str, body: str) -> str:
    """Render a self-contained page with the embedded CSS of all reports."""
    css = load_asset("base.css") + files("vz_ray.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{css}</style></head>"
        f"<body><main><header><h1>{escape(heading)}</h1></header>{body}</main></body></html>\n"
    )


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def section(title: str, body: str, kind: str = "charts") -> str:
    """Render a section of the page; return an empty string without content."""
    return f'<section><h2>{escape(title)}</h2><div class="{kind}">{body}</div></section>' if body else ""


def figure(title: str, body: str, *, footnote: str = "", wide: bool = False) -> str:
    opening = '<figure class="wide">' if wide else "<figure>"
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    return f"{opening}{caption}{body}{note(footnote)}</figure>"


def table(
    title: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[object]]], *, footnote: str = ""
) -> str:
    """Render a wide figure with a table. A row is its header and its cells; `columns` includes the header's."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    scroll = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return figure(title, scroll, footnote=footnote, wide=True)


def bar(
    label: str, value: str, percent: float, *, color: int = 1, interval: Sequence[float] = (), tooltip: str = ""
) -> str:
    """Render a labeled bar.

    Args:
        label: Text before the bar.
        value: Text after the bar.
        percent: Length of the bar in percent of the track; 0 draws none.
        color: Color class, 1 to 5.
        interval: Ends of the interval line in percent.
        tooltip: Text on hover.
    """
    title = f' title="{escape(tooltip)}"' if tooltip else ""
    fill = f'<b style="width:{percent:.2f}%"></b>' if percent else ""
    line = f'<i style="left:{interval[0]:.2f}%;width:{interval[1] - interval[0]:.2f}%"></i>' if interval else ""
    return (
        f'<div class="bar s{color}"{title}><span>{escape(label)}</span>'
        f'<div class="track">{fill}{line}</div><em>{escape(value)}</em></div>'
    )


def legend(items: Iterable[tuple[str, str]]) -> str:
    """Render a legend of `(CSS class, name)`."""
    entries = "".join(f'<span class="{css_class}"><i></i>{escape(name)}</span>' for css_class, name in items)
    return f'<div class="legend">{entries}</div>'
