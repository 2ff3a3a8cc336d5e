"""Terminal view of a run: the screen of `vz-ray top`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vz_ray.monitoring.live_status import LiveStatus, RunKind, RunState
from vz_ray.monitoring.run_view import RunView, read_run_view
from vz_ray.utils.durations import format_duration

REDRAW_INTERVAL_S = 2.0
SPARKLINE_WIDTH = 40
"""Number of steps in a curve."""
PLAIN_WIDTH = 110
"""Columns of the output without a terminal."""
_BARS = "▁▂▃▄▅▆▇█"
_COLORS = {
    RunState.RUNNING: "green",
    RunState.ENDED: "cyan",
    RunState.STOPPED: "yellow",
    RunState.FAILED: "bold red",
    RunState.STALE: "bold red",
}


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH) -> str:
    """Return the last values as bars, scaled from minimum to maximum; `×` marks a non-finite value.

    Example: `sparkline([0, 1, 2, 3])` is `▁▃▅█`
    """
    recent = list(values)[-width:]
    finite = [value for value in recent if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "×"
        return _BARS[int((value - low) / span * (len(_BARS) - 1))] if span else _BARS[0]

    return "".join(map(bar, recent))


def render_view(view: RunView) -> RenderableType:
    """Render the whole screen."""
    status = view.status
    parts = [
        _headline(view),
        _notice(view),
        _curves(view),
        _rollout(status) if status and status.rollout else None,
        _decode(status) if status and status.decode else None,
        _warnings(view),
    ]
    return Group(*(part for part in parts if part is not None))


def show_top(view: RunView, follow: bool, console: Console) -> None:
    """Print `view`. With `follow`, refresh it until the run ends or Ctrl-C."""
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    if not follow:
        console.print(render_view(view))
        return
    with Live(render_view(view), console=console, auto_refresh=False, screen=True) as screen:
        while view.state not in (RunState.ENDED, RunState.STOPPED, RunState.FAILED):
            time.sleep(REDRAW_INTERVAL_S)
            view = read_run_view(view.path)
            screen.update(render_view(view), refresh=True)
    console.print(render_view(view))


def _headline(view: RunView) -> RenderableType:
    status, line = view.status, Text()
    line.append(str(view.path), style="bold")
    if status is None or view.state is None:
        return line.append("  not started", style="yellow")
    line.append(f"  {view.state.value}", style=_COLORS[view.state])
    line.append(f"  {status.host}:{status.pid}\n", style="dim")
    if status.max_steps or status.step:
        total = f" of {status.max_steps}" if status.max_steps else ""
        line.append(f"{RunKind(status.run_kind).unit} {status.step}{total}")
    if view.state is RunState.RUNNING:
        phase_duration = format_duration(view.read_s - status.phase_started_s)
        line.append(f"  {status.phase} for {phase_duration}", style="bold")
        line.append(f"  left {'-' if status.eta_s is None else format_duration(status.eta_s)}")
    if checkpoint := status.checkpoint:
        age = format_duration(view.read_s - checkpoint["at_s"])
        line.append(f"  checkpoint {checkpoint['step']:.0f} {age} ago, took {checkpoint['seconds']:.1f} s")
    return line


def _notice(view: RunView) -> RenderableType | None:
    """Return a box with the outcome of a run that is not running."""
    status = view.status
    if status is None or view.state in (None, RunState.RUNNING):
        return None
    age = format_duration(status.age_s(view.read_s))
    resume_point = "with the next episode" if status.run_kind == RunKind.DISTILL else "from the last checkpoint"
    message = {
        RunState.ENDED: f"The run ended {age} ago.",
        RunState.STOPPED: f"The run was stopped {age} ago; the same command resumes {resume_point}.",
        RunState.FAILED: f"The run failed {age} ago: {status.error}",
        RunState.STALE: (
            f"No heartbeat for {age}, expected every {status.heartbeat_interval_s:g} s: the driver (process "
            f"{status.pid} on {status.host}) was killed, or cannot write here. The same command resumes "
            f"{resume_point}."
        ),
    }
    return Panel(Text(message[view.state]), border_style=_COLORS[view.state])


def _curves(view: RunView) -> RenderableType | None:
    if not any(view.curves.values()):
        return None
    table = Table.grid(padding=(0, 2))
    for name, values in view.curves.items():
        if values:
            table.add_row(name, Text(sparkline(values), style="cyan"), f"{values[-1]:.4g}")
    return table


def _rollout(status: LiveStatus) -> RenderableType:
    rollout = status.rollout
    states = "  ".join(f"{count} {state}" for state, count in sorted(rollout["workers"].items()))
    rates = f"{rollout['tokens_per_second']:.0f} tokens/s  {rollout['episodes_per_second']:.2f} episodes/s"
    episodes = f"{rollout['running']} running  {rollout['queued']} queued"
    line = Text(f"rollout  {states or 'no workers'}  {episodes}  {rates}")
    if not rollout["worker_statuses"]:
        return line
    table = Table(box=None, pad_edge=False)
    for column in ("worker", "state", "episodes", ""):
        table.add_column(column, justify="right" if column == "episodes" else "left")
    for worker in rollout["worker_statuses"]:
        table.add_row(worker["name"], worker["state"], str(worker["load"]), worker["reason"])
    return Group(line, table)


def _decode(status: LiveStatus) -> RenderableType:
    decode, line = status.decode, Text("decode  ")
    if "decoders" in decode:
        unresponsive = f", {decode['unresponsive']} unresponsive" if decode["unresponsive"] else ""
        line.append(f"{decode['decoders']} decoders{unresponsive}  cache hits {decode['hit_ratio']:.0%}  ")
    line.append(f"{decode['in_flight']} in flight  {decode['waiting']} waiting  ")
    if decode["wait_p50_s"] is not None:
        line.append(f"latency {decode['wait_p50_s']:.3f}s p50, {decode['wait_p95_s']:.3f}s p95  ")
    problems = f"{decode['failures']} failures, {decode['quarantined']} quarantined"
    return line.append(problems, style="red" if decode["failures"] or decode["quarantined"] else "dim")


def _warnings(view: RunView) -> RenderableType:
    if not view.warnings:
        return Text("no warnings", style="dim")
    table = Table.grid(padding=(0, 1))
    for timestamp, level, logger, message in view.warnings:
        table.add_row(Text(timestamp, "dim"), Text(level, "yellow"), Text(logger, "dim"), Text(message))
    return table
