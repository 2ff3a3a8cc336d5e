"""A look at a run, drawn for a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live as Redrawn
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vz_ray.observe.live import EPISODE, Live, State
from vz_ray.watch.looking import View, look

REDRAW_S = 2.0
WIDTH = 40
"""Iterations that a curve shows: the last ones."""
PLAIN_WIDTH = 110
"""Columns where there is no terminal to ask."""
_BARS = "▁▂▃▄▅▆▇█"
_COLORS = {
    State.RUNNING: "green",
    State.ENDED: "cyan",
    State.STOPPED: "yellow",
    State.FAILED: "bold red",
    State.SILENT: "bold red",
}


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """The last values as bars between their lowest and highest; `×` for what is no finite number.

    Example: `sparkline([0, 1, 2, 3])` is `▁▃▅█`
    """
    shown = list(values)[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "×"
        return _BARS[int((value - low) / span * (len(_BARS) - 1))] if span else _BARS[0]

    return "".join(map(bar, shown))


def duration(seconds: float | None) -> str:
    """`75.0` -> `1m 15s`; a dash where nobody knows."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def draw(view: View) -> RenderableType:
    """The whole screen."""
    parts: list[RenderableType] = [_headline(view)]
    if (notice := _notice(view)) is not None:
        parts.append(notice)
    if (curves := _curves(view)) is not None:
        parts.append(curves)
    if view.live is not None and view.live.fleet:
        parts.append(_fleet(view.live))
    if view.live is not None and view.live.clips:
        parts.append(_clips(view.live))
    parts.append(_warnings(view))
    return Group(*parts)


def top(view: View, path_again: bool, console: Console) -> None:
    """Draws `view`; with `path_again`, looks and draws again until Ctrl-C, or until the run is over."""
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    if not path_again:
        console.print(draw(view))
        return
    with Redrawn(draw(view), console=console, auto_refresh=False, screen=True) as screen:
        while view.state not in (State.ENDED, State.STOPPED, State.FAILED):
            time.sleep(REDRAW_S)
            view = look(view.path)
            screen.update(draw(view), refresh=True)
    console.print(draw(view))


def _headline(view: View) -> RenderableType:
    live, line = view.live, Text()
    line.append(str(view.path), style="bold")
    if live is None or view.state is None:
        return line.append("  has not begun to train", style="yellow")
    line.append(f"  {view.state.value}", style=_COLORS[view.state])
    line.append(f"  {live.host}:{live.pid}\n", style="dim")
    if live.iterations or live.iteration:
        of = f" of {live.iterations}" if live.iterations else ""
        line.append(f"{live.unit} {live.iteration}{of}")
    if view.state is State.RUNNING:
        since = duration(view.at_s - live.phase_since_s)
        line.append(f"  {live.phase} for {since}", style="bold")
        line.append(f"  left {duration(live.left_s)}")
    saved = live.checkpoint
    if saved:
        age = duration(view.at_s - saved["at_s"])
        line.append(f"  checkpoint {saved['iteration']:.0f} {age} ago, took {saved['seconds']:.1f}s")
    return line


def _notice(view: View) -> RenderableType | None:
    """A box for who need not look any further."""
    live = view.live
    if live is None or view.state in (None, State.RUNNING):
        return None
    ago = duration(live.age_s(view.at_s))
    goes_on = "where it was" if live.unit == EPISODE else "from its last checkpoint"
    said = {
        State.ENDED: f"The run has ended, {ago} ago.",
        State.STOPPED: f"The run was stopped {ago} ago; the same command goes on {goes_on}.",
        State.FAILED: f"The run failed {ago} ago: {live.error}",
        State.SILENT: (
            f"No heartbeat for {ago}, one was due every {live.every_s:g}s: the driver (process {live.pid} on "
            f"{live.host}) was killed, or cannot write here. The same command goes on {goes_on}."
        ),
    }
    return Panel(Text(said[view.state]), border_style=_COLORS[view.state])


def _curves(view: View) -> RenderableType | None:
    if not any(view.curves.values()):
        return None
    table = Table.grid(padding=(0, 2))
    for name, values in view.curves.items():
        if values:
            table.add_row(name, Text(sparkline(values), style="cyan"), f"{values[-1]:.4g}")
    return table


def _fleet(live: Live) -> RenderableType:
    fleet = live.fleet
    states = "  ".join(f"{count} {state}" for state, count in sorted(fleet["workers"].items()))
    rates = f"{fleet['tokens_per_s']:.0f} tokens/s  {fleet['episodes_per_s']:.2f} episodes/s"
    line = f"fleet  {states or 'no worker'}  {fleet['playing']} playing  {fleet['waiting']} waiting  {rates}"
    table = Table(box=None, pad_edge=False)
    for column in ("worker", "state", "episodes", ""):
        table.add_column(column, justify="right" if column == "episodes" else "left")
    for seat in fleet["seats"]:
        table.add_row(seat["name"], seat["state"], str(seat["load"]), seat["why"])
    return Group(Text(line), table) if fleet["seats"] else Text(line)


def _clips(live: Live) -> RenderableType:
    clips, line = live.clips, Text("clips  ")
    if "decoders" in clips:
        silent = f", {clips['silent']} silent" if clips["silent"] else ""
        line.append(f"{clips['decoders']} decoders{silent}  cache hits {clips['hit_ratio']:.0%}  ")
    line.append(f"{clips['in_flight']} in flight  {clips['waiting']} waiting  ")
    if clips["wait_p50_s"] is not None:
        line.append(f"waits {clips['wait_p50_s']:.3f}s median, {clips['wait_p95_s']:.3f}s p95  ")
    trouble = f"{clips['failures']} failures, {clips['quarantined']} in quarantine"
    return line.append(trouble, style="red" if clips["failures"] or clips["quarantined"] else "dim")


def _warnings(view: View) -> RenderableType:
    if not view.warnings:
        return Text("no warnings", style="dim")
    table = Table.grid(padding=(0, 1))
    for at, level, who, said in view.warnings:
        table.add_row(Text(at, style="dim"), Text(level, style="yellow"), Text(who, style="dim"), Text(said))
    return table
