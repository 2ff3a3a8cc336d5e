"""The page with the quickstart's own agent, on needle videos: nothing is scripted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium  # noqa: F401
from tests.serve.browsing import DESK, answered, attach, shot, shown_at, until
from tests.serve.running import Running, config_of, running
from vz_ray.config.data import SynthConfig
from vz_ray.data.needle.synth import encode, tasks_of
from vz_ray.data.needle.world import Kind, make_video
from vz_ray.serve.app import AgentReplica

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

AGENT = Path("runs/quickstart/models/rl")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if not AGENT.exists():
        pytest.skip(f"there is no agent at {AGENT}: `make quickstart` trains one")
    folder = tmp_path_factory.mktemp("agent")
    with running(config_of(folder, model=AGENT), folder, AgentReplica) as found:
        yield found


def test_a_question_about_a_needle_video(server: Running, chromium: Any, tmp_path: Path):  # noqa: F811
    needle = make_video(11, 96.0, (Kind.IDENTIFY,))
    encode(needle, tmp_path / "needle.mp4", SynthConfig())
    task = tasks_of(needle, tmp_path / "needle.mp4")[0]
    page = chromium.new_page(viewport=DESK)
    page.set_default_timeout(60_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.url)
    attach(page, tmp_path / "needle.mp4")
    found = answered(page, task.question)
    bars = page.locator(".tl-zoom")
    until(lambda: bars.count() >= 1, "a zoom")
    assert page.locator(".tl-tick").count() == 16
    assert found.locator(".answer").text_content()
    frame = found.locator(".strip").nth(1).get_by_role("button").first
    time = frame.get_attribute("aria-label").removeprefix("Frame at ")
    minutes, seconds = time.split(":")
    frame.click()
    until(lambda: abs(shown_at(page) - 60 * int(minutes) - float(seconds)) < 0.13, time)
    shot(page, "needle")
    assert said == []
    page.close()
