"""What a person sees while a run goes on: stage, bar with time left, last metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

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
"""Seconds between lines of one stage where there is no terminal to redraw."""
RESUMED_WITHIN_S = 1.0
"""What is done by then was done before: it says nothing about the pace."""


class ProgressStage:
    """A part of a run under way; made by `Progress.stage`."""

    def __init__(self, progress: Progress, name: str, total: int | None, done: int) -> None:
        self._progress, self.name, self.total, self.done = progress, name, total, done
        self._began, self._before = time.monotonic(), done

    def advance(self, steps: int = 1) -> None:
        """`steps` more of `total` are done."""
        self.done += steps
        if time.monotonic() - self._began < RESUMED_WITHIN_S:
            self._before = self.done
        self._progress._moved(self)

    @property
    def eta_s(self) -> float | None:
        """Seconds until the end at the pace so far; None where nobody can say."""
        paced = self.done - self._before
        if self.total is None or paced <= 0:
            return None
        return max(0, self.total - self.done) * (time.monotonic() - self._began) / paced


class Progress:
    """A live display on a terminal, plain lines elsewhere.

    Example:
        with Progress() as progress, progress.stage("rl", total=40) as stage:
            progress.show({"reward": 0.61})
            stage.advance()

    Attributes:
        stage_seconds: Wall time of every finished stage, by name; repeated names add up.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.stage_seconds: dict[str, float] = {}
        self._live: Live | None = None
        self._metrics = Text()
        self._last_line = 0.0
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
            self._live = Live(self._drawing(), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, done: int = 0) -> Iterator[ProgressStage]:
        """One part of the run, `done` of `total` steps already behind it (after a resume)."""
        started = time.monotonic()
        stage = ProgressStage(self, name, total, done)
        if self._live:
            self._tasks[name] = self._bars.add_task(name, total=total, completed=done)
        else:
            self.print_line(f"{name} ...")
        ended = "stopped"
        try:
            yield stage
            ended = "done"
        finally:
            seconds = time.monotonic() - started
            self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + seconds
            if self._live:
                if ended == "done":
                    whole = total or stage.done or 1
                    self._bars.update(self._tasks[name], total=whole, completed=whole)
                self._bars.stop_task(self._tasks[name])
            else:
                self.print_line(f"{name} {ended} after {seconds:.1f} s")

    def show_metrics(self, values: Mapping[str, float]) -> None:
        """Replaces the row of metrics (prints it where there is no terminal)."""
        row = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._live:
            self._metrics = Text(row, style="dim")
            self._live.update(self._drawing())
        else:
            self.print_line(f"  {row}")

    def print_line(self, line: str) -> None:
        """A line that stays, above the display."""
        self.console.print(line, highlight=False, markup=False)

    def clear_stages(self) -> None:
        """Takes all stages so far off the display: a run of dozens would not fit a screen."""
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._tasks.clear()

    def _drawing(self) -> Group:
        return Group(self._bars, self._metrics)

    def _moved(self, stage: ProgressStage) -> None:
        if self._live:
            self._bars.update(self._tasks[stage.name], completed=stage.done)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            of = f" of {stage.total}" if stage.total else ""
            left = "" if stage.eta_s is None else f", {round(stage.eta_s)} s left"
            self.print_line(f"  {stage.name} {stage.done}{of}{left}")
