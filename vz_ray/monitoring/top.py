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

from vz_ray.monitoring.live_status import DISTILL_RUN, LiveStatus, RunState
from vz_ray.monitoring.run_view import RunView, read_run_view

REDRAW_INTERVAL_S = 2.0
SPARKLINE_WIDTH = 40
"""Iterations that a curve shows: the last ones."""
PLAIN_WIDTH = 110
"""Columns where there is no terminal to ask."""
_BARS = "▁▂▃▄▅▆▇█"
_COLORS = {
    RunState.RUNNING: "green",
    RunState.ENDED: "cyan",
    RunState.STOPPED: "yellow",
    RunState.FAILED: "bold red",
    RunState.STALE: "bold red",
}


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH) -> str:
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


def format_short_duration(seconds: float | None) -> str:
    """`75.0` -> `1m 15s`; a dash where nobody knows."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def render_view(view: RunView) -> RenderableType:
    """The whole screen."""
    parts: list[RenderableType] = [_headline(view)]
    if (notice := _notice(view)) is not None:
        parts.append(notice)
    if (curves := _curves(view)) is not None:
        parts.append(curves)
    if view.status is not None and view.status.rollout:
        parts.append(_fleet(view.status))
    if view.status is not None and view.status.decode:
        parts.append(_clips(view.status))
    parts.append(_warnings(view))
    return Group(*parts)


def show_top(view: RunView, follow: bool, console: Console) -> None:
    """Draws `view`; with `follow`, looks and draws again until Ctrl-C, or until the run is over."""
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    if not follow:
        console.print(render_view(view))
        return
    with Redrawn(render_view(view), console=console, auto_refresh=False, screen=True) as screen:
        while view.state not in (RunState.ENDED, RunState.STOPPED, RunState.FAILED):
            time.sleep(REDRAW_INTERVAL_S)
            view = read_run_view(view.path)
            screen.update(render_view(view), refresh=True)
    console.print(render_view(view))


def _headline(view: RunView) -> RenderableType:
    live, line = view.status, Text()
    line.append(str(view.path), style="bold")
    if live is None or view.state is None:
        return line.append("  has not begun to train", style="yellow")
    line.append(f"  {view.state.value}", style=_COLORS[view.state])
    line.append(f"  {live.host}:{live.pid}\n", style="dim")
    if live.max_steps or live.step:
        of = f" of {live.max_steps}" if live.max_steps else ""
        line.append(f"{live.run_kind} {live.step}{of}")
    if view.state is RunState.RUNNING:
        since = format_short_duration(view.read_s - live.phase_started_s)
        line.append(f"  {live.phase} for {since}", style="bold")
        line.append(f"  left {format_short_duration(live.eta_s)}")
    saved = live.checkpoint
    if saved:
        age = format_short_duration(view.read_s - saved["at_s"])
        line.append(f"  checkpoint {saved['iteration']:.0f} {age} ago, took {saved['seconds']:.1f}s")
    return line


def _notice(view: RunView) -> RenderableType | None:
    """A box for who need not look any further."""
    live = view.status
    if live is None or view.state in (None, RunState.RUNNING):
        return None
    ago = format_short_duration(live.age_s(view.read_s))
    goes_on = "where it was" if live.run_kind == DISTILL_RUN else "from its last checkpoint"
    said = {
        RunState.ENDED: f"The run has ended, {ago} ago.",
        RunState.STOPPED: f"The run was stopped {ago} ago; the same command goes on {goes_on}.",
        RunState.FAILED: f"The run failed {ago} ago: {live.error}",
        RunState.STALE: (
            f"No heartbeat for {ago}, one was due every {live.heartbeat_interval_s:g}s: the driver (process {live.pid} on "
            f"{live.host}) was killed, or cannot write here. The same command goes on {goes_on}."
        ),
    }
    return Panel(Text(said[view.state]), border_style=_COLORS[view.state])


def _curves(view: RunView) -> RenderableType | None:
    if not any(view.curves.values()):
        return None
    table = Table.grid(padding=(0, 2))
    for name, values in view.curves.items():
        if values:
            table.add_row(name, Text(sparkline(values), style="cyan"), f"{values[-1]:.4g}")
    return table


def _fleet(live: LiveStatus) -> RenderableType:
    fleet = live.rollout
    states = "  ".join(f"{count} {state}" for state, count in sorted(fleet["workers"].items()))
    rates = f"{fleet['tokens_per_s']:.0f} tokens/s  {fleet['episodes_per_s']:.2f} episodes/s"
    line = f"fleet  {states or 'no worker'}  {fleet['playing']} playing  {fleet['waiting']} waiting  {rates}"
    table = Table(box=None, pad_edge=False)
    for column in ("worker", "state", "episodes", ""):
        table.add_column(column, justify="right" if column == "episodes" else "left")
    for seat in fleet["seats"]:
        table.add_row(seat["name"], seat["state"], str(seat["load"]), seat["why"])
    return Group(Text(line), table) if fleet["seats"] else Text(line)


def _clips(live: LiveStatus) -> RenderableType:
    clips, line = live.decode, Text("clips  ")
    if "decoders" in clips:
        silent = f", {clips['silent']} silent" if clips["silent"] else ""
        line.append(f"{clips['decoders']} decoders{silent}  cache hits {clips['hit_ratio']:.0%}  ")
    line.append(f"{clips['in_flight']} in flight  {clips['waiting']} waiting  ")
    if clips["wait_p50_s"] is not None:
        line.append(f"waits {clips['wait_p50_s']:.3f}s median, {clips['wait_p95_s']:.3f}s p95  ")
    trouble = f"{clips['failures']} failures, {clips['quarantined']} in quarantine"
    return line.append(trouble, style="red" if clips["failures"] or clips["quarantined"] else "dim")


def _warnings(view: RunView) -> RenderableType:
    if not view.warnings:
        return Text("no warnings", style="dim")
    table = Table.grid(padding=(0, 1))
    for at, level, who, said in view.warnings:
        table.add_row(Text(at, style="dim"), Text(level, style="yellow"), Text(who, style="dim"), Text(said))
    return table
