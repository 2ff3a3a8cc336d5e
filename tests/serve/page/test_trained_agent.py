"""The web page with the trained agent of the quickstart, on needle videos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.live_server import LiveServer, live_server, tiny_serve_config
from tests.serve.page.page_actions import DESKTOP, ask_and_wait, attach, current_time, screenshot, wait_until
from vz_ray.config.data import SynthConfig
from vz_ray.needle.needle_video import QuestionKind, make_video
from vz_ray.needle.synthesis import encode_video, make_tasks
from vz_ray.serve.app import AgentReplica

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

AGENT = Path("runs/quickstart/models/rl")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not AGENT.exists():
        pytest.skip(f"there is no agent at {AGENT}: `make quickstart` trains one")
    folder = tmp_path_factory.mktemp("agent")
    with live_server(tiny_serve_config(folder, model=AGENT), folder, AgentReplica) as running:
        yield running


def test_question_about_a_needle_video(server: LiveServer, chromium: Any, tmp_path: Path):
    needle = make_video(11, 96.0, (QuestionKind.IDENTIFY,))
    encode_video(needle, tmp_path / "needle.mp4", SynthConfig())
    task = make_tasks(needle, tmp_path / "needle.mp4")[0]
    page = chromium.new_page(viewport=DESKTOP)
    page.set_default_timeout(60_000)
    console: list[str] = []
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.goto(server.url)
    attach(page, tmp_path / "needle.mp4")
    exchange = ask_and_wait(page, task.question)
    bars = page.locator(".tl-zoom")
    wait_until(lambda: bars.count() >= 1, "a zoom")
    assert page.locator(".tl-tick").count() == 16
    assert exchange.locator(".answer").text_content()
    frame = exchange.locator(".frame-strip").nth(1).get_by_role("button").first
    time = frame.get_attribute("aria-label").removeprefix("Frame at ")
    minutes, seconds = time.split(":")
    frame.click()
    wait_until(lambda: abs(current_time(page) - 60 * int(minutes) - float(seconds)) < 0.13, time)
    screenshot(page, "needle")
    assert console == []
    page.close()
