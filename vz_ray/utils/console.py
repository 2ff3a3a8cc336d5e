"""Console of commands that print to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console(min_width: int = 0, console: Console | None = None) -> Console:
    """Return `console`, or one for stdout; if it is not a terminal, it is at least `min_width` columns wide."""
    from rich.console import Console

    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, min_width)
    return console
