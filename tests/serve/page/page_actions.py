"""Actions of a user on the web page, in a browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.browser import Page, save_screenshot

DESKTOP = {"width": 1280, "height": 860}
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


def screenshot(page: Page, name: str) -> None:
    save_screenshot(page, f"page-{name}")
