"""Progress display with and without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vz_ray.monitoring.progress import Progress


def make_console(terminal: bool) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=terminal, width=100), output


def test_stage_prints_plain_lines_without_a_terminal():
    console, output = make_console(terminal=False)
    with Progress(console) as progress, progress.stage("rl", total=2) as stage:
        progress.show_metrics({"reward": 0.6125, "zooms": 2})
        stage.advance(2)
    lines = output.getvalue().splitlines()
    assert lines[0] == "rl ..."
    assert "  reward 0.6125  zooms 2" in lines
    assert "  rl 2 of 2" in lines
    assert lines[-1].startswith("rl done after ")
    assert "\x1b" not in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_seconds_of_equal_stages_are_summed(terminal):
    console, output = make_console(terminal)
    with Progress(console) as progress:
        for _ in range(2):
            with progress.stage("cold start", total=3, done=1) as stage:
                stage.advance()
    assert list(progress.stage_seconds) == ["cold start"]
    assert "cold start" in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_failed_stage_is_not_done(terminal):
    console, output = make_console(terminal)
    with pytest.raises(KeyError), Progress(console) as progress, progress.stage("rl", total=2):
        raise KeyError("x")
    assert "rl" in progress.stage_seconds
    assert "done" not in output.getvalue()
    assert "2/2" not in output.getvalue()


def test_terminal_bar_reaches_its_end():
    console, output = make_console(terminal=True)
    with Progress(console) as progress, progress.stage("encode") as stage:
        stage.advance(7)
        progress.show_metrics({"files": 7})
    assert "7/7" in output.getvalue()
    assert "files 7" in output.getvalue()


def test_cleared_stages_leave_the_display():
    console, output = make_console(terminal=True)
    with Progress(console) as progress:
        for name in ("first", "second"):
            progress.clear_stages()
            with progress.stage(name, total=1) as stage:
                stage.advance()
        output.truncate(0)
        progress.show_metrics({"x": 1})
    assert "second" in output.getvalue()
    assert "first" not in output.getvalue()


def test_eta_ignores_restored_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vz_ray.monitoring.progress.time.monotonic", lambda: now[0])
    console, output = make_console(terminal=False)
    with Progress(console) as progress, progress.stage("eval", total=100) as stage:
        stage.advance(40)  # restored from a checkpoint
        assert stage.eta_s is None
        now[0] = 20.0
        stage.advance(10)
        assert stage.eta_s == 100.0
    assert "  eval 50 of 100, 100 s left" in output.getvalue().splitlines()
