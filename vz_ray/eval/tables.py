"""Tables of results for the terminal, and the format of their numbers."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table


def number_cell(value: float | None, digits: int = 1) -> str:
    """Format a number of a cell; `-` if it is missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent_cell(value: float | None) -> str:
    """Format a fraction in percent, without the sign, which is in the heading."""
    return number_cell(None if value is None else 100 * value)


def results_table(title: str, *headings: str, first: str = "", first_width: int | None = None) -> Table:
    """Return a table with a column of names and right-aligned columns.

    The minimum width lets a heading wrap between words but not within a word.
    """
    table = Table(title=title, title_justify="left", pad_edge=False, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=first_width is None, min_width=first_width)
    for heading in headings:
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    return table
