from __future__ import annotations

import io

import pytest
from rich.console import Console

from vz_ray.monitoring.progress import Progress


def screen(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=100), out


def test_without_a_terminal_each_stage_has_plain_lines():
    console, out = screen(terminal=False)
    with Progress(console) as progress, progress.stage("rl", total=2) as stage:
        progress.show_metrics({"reward": 0.6125, "zooms": 2})
        stage.advance(2)
    lines = out.getvalue().splitlines()
    assert lines[0] == "rl ..."
    assert "  reward 0.6125  zooms 2" in lines
    assert "  rl 2 of 2" in lines
    assert lines[-1].startswith("rl done after ")
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_or_not_the_seconds_of_stages_add_up(terminal):
    console, out = screen(terminal)
    with Progress(console) as progress:
        for _ in range(2):
            with progress.stage("cold start", total=3, done=1) as stage:
                stage.advance()
    assert list(progress.stage_seconds) == ["cold start"]
    assert "cold start" in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_that_fails_is_not_called_done(terminal):
    console, out = screen(terminal)
    with pytest.raises(KeyError), Progress(console) as progress, progress.stage("rl", total=2):
        raise KeyError("x")
    assert "rl" in progress.stage_seconds
    assert "done" not in out.getvalue()
    assert "2/2" not in out.getvalue()


def test_on_a_terminal_the_bar_reaches_its_end():
    console, out = screen(terminal=True)
    with Progress(console) as progress, progress.stage("encode") as stage:
        stage.advance(7)
        progress.show_metrics({"files": 7})
    assert "7/7" in out.getvalue()
    assert "files 7" in out.getvalue()


def test_what_is_done_can_be_taken_off_the_display():
    console, out = screen(terminal=True)
    with Progress(console) as progress:
        for name in ("first", "second"):
            progress.clear_stages()
            with progress.stage(name, total=1) as stage:
                stage.advance()
        out.truncate(0)
        progress.show_metrics({"x": 1})
    assert "second" in out.getvalue()
    assert "first" not in out.getvalue()


def test_time_left_is_that_of_the_pace_after_what_was_done_before(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vz_ray.monitoring.progress.time.monotonic", lambda: now[0])
    console, out = screen(terminal=False)
    with Progress(console) as progress, progress.stage("eval", total=100) as stage:
        stage.advance(40)  # of an earlier run
        assert stage.eta_s is None
        now[0] = 20.0
        stage.advance(10)
        assert stage.eta_s == 100.0
    assert "  eval 50 of 100, 100 s left" in out.getvalue().splitlines()
