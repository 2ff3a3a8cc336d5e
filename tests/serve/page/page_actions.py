"""Actions of a user on the web page, in a browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vz_ray

ARTEFACTS = Path(vz_ray.__file__).parent.parent / "test-artefacts"
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
Page = Any
OpenPage = Callable[..., Page]
# Directives in braces script the turns of the agent.
QUESTION = "What flashes? {think 12} {zoom 2 4 2} {zoom 6 10 1} {answer B} A. disc B. ring C. cross"


def attach(page: Page, *files: Path) -> None:
    before = page.locator("li.video").count()
    page.set_input_files("input[type=file]", files)
    for number in range(before, before + len(files)):
        page.locator("li.video").nth(number).locator(".video-status", has_text="KB").wait_for()


def ask(page: Page, text: str) -> Page:
    """Submit a question and return the element of its exchange."""
    page.fill("#question", text)
    page.keyboard.press("Control+Enter")
    return page.locator("article.exchange").last


def ask_and_wait(page: Page, text: str) -> Page:
    exchange = ask(page, text)
    exchange.locator("dl.facts").wait_for()
    return exchange


def wait_until(condition: Callable[[], object], description: str) -> None:
    end_time = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_time, f"never: {description}"
        time.sleep(0.05)


def current_time(page: Page) -> float:
    return float(page.evaluate("document.querySelector('video').currentTime"))


def accessibility_violations(page: Page) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [f"{violation['id']}: {violation['nodes'][0]['html']}" for violation in violations]


def fits_width(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def screenshot(page: Page, name: str) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"page-{name}.png")
