"""Terminal progress of a run: stages with bars and remaining time, and the latest metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

PLAIN_INTERVAL_S = 15.0
"""Minimum time between two lines of a stage without a terminal."""
RESUMED_WITHIN_S = 1.0
"""Steps completed this early were restored from a checkpoint and do not count for the remaining time."""


class ProgressStage:
    """An active stage, created by `Progress.stage`."""

    def __init__(self, progress: Progress, name: str, total: int | None, done: int) -> None:
        self._progress, self.name, self.total, self.done = progress, name, total, done
        self._started, self._restored = time.monotonic(), done

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more completed steps."""
        self.done += steps
        if time.monotonic() - self._started < RESUMED_WITHIN_S:
            self._restored = self.done
        self._progress._on_advance(self)

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds until the stage ends; None without a total or without a measured step."""
        measured = self.done - self._restored
        if self.total is None or measured <= 0:
            return None
        return max(0, self.total - self.done) * (time.monotonic() - self._started) / measured


class Progress:
    """Live display on a terminal, plain lines otherwise.

    Example:
        with Progress() as progress, progress.stage("rl", total=40) as stage:
            progress.show_metrics({"reward/total": 0.61})
            stage.advance()

    Attributes:
        stage_seconds: Wall time of each finished stage by name. Times of equal names are summed.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.stage_seconds: dict[str, float] = {}
        self._live: Live | None = None
        self._metrics = Text()
        self._last_line_s = 0.0
        self._bars = Bars(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, done: int = 0) -> Iterator[ProgressStage]:
        """Display a stage of `total` steps, of which `done` were completed before a resume."""
        started = time.monotonic()
        stage = ProgressStage(self, name, total, done)
        if self._live:
            self._tasks[name] = self._bars.add_task(name, total=total, completed=done)
        else:
            self.print_line(f"{name} ...")
        outcome = "stopped"
        try:
            yield stage
            outcome = "done"
        finally:
            seconds = time.monotonic() - started
            self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + seconds
            if self._live:
                if outcome == "done":
                    completed = total or stage.done or 1
                    self._bars.update(self._tasks[name], total=completed, completed=completed)
                self._bars.stop_task(self._tasks[name])
            else:
                self.print_line(f"{name} {outcome} after {seconds:.1f} s")

    def show_metrics(self, values: Mapping[str, float]) -> None:
        """Replace the row of metrics; print it if there is no terminal."""
        row = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._live:
            self._metrics = Text(row, style="dim")
            self._live.update(self._render())
        else:
            self.print_line(f"  {row}")

    def print_line(self, line: str) -> None:
        """Print a permanent line above the display."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def clear_stages(self) -> None:
        """Remove all stages from the display, so that dozens of stages fit the screen."""
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._tasks.clear()

    def _render(self) -> Group:
        return Group(self._bars, self._metrics)

    def _on_advance(self, stage: ProgressStage) -> None:
        if self._live:
            self._bars.update(self._tasks[stage.name], completed=stage.done)
            return
        now = time.monotonic()
        if now - self._last_line_s >= PLAIN_INTERVAL_S:
            self._last_line_s = now
            total = f" of {stage.total}" if stage.total else ""
            eta = "" if stage.eta_s is None else f", {round(stage.eta_s)} s left"
            self.print_line(f"  {stage.name} {stage.done}{total}{eta}")
