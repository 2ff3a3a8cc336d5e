"""The web page with the keyboard only, on a phone, and against accessibility rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import PHONE, accessibility_violations, fits_width
from tests.serve.page.page_actions import (
    DESKTOP,
    QUESTION,
    OpenPage,
    ask_and_wait,
    attach,
    current_time,
    screenshot,
    wait_until,
)

pytestmark = pytest.mark.slow


def test_keyboard_only_use(open_page: OpenPage, video: Path):
    page = open_page()
    focused = "document.activeElement.textContent + (document.activeElement.getAttribute('aria-label') ?? '')"

    def tab_to(words: str, key: str = "Tab") -> None:
        for _ in range(80):
            page.keyboard.press(key)
            if words in page.evaluate(focused):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", words
                return
        raise AssertionError(f"{words} is not reached")

    tab_to("Choose a video")
    with page.expect_file_chooser() as chosen:
        page.keyboard.press("Enter")
    chosen.value.set_files(video)
    page.locator("li.video .video-status", has_text="KB").wait_for()
    page.keyboard.type(QUESTION)  # Adding a video moves the focus to the question.
    page.keyboard.press("Control+Enter")
    page.locator("dl.facts").wait_for()
    tab_to("Frame at 0:07", "Shift+Tab")
    page.keyboard.press("Enter")
    wait_until(lambda: current_time(page) == 7.0, "7 s")
    tab_to("Turn 1: 0:02", "Shift+Tab")
    page.keyboard.press("Space")
    wait_until(lambda: current_time(page) == 2.0, "2 s")
    tab_to("Add video")
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Add a video").wait_for()
    page.keyboard.press("Escape")
    tab_to("New chat", "Shift+Tab")
    page.keyboard.press("Enter")
    assert page.get_by_role("heading", name="Ask about a video").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "size"), [("desktop", DESKTOP), ("phone", PHONE)])
def test_accessibility_at_all_sizes(open_page: OpenPage, video: Path, scheme: str, device: str, size: dict[str, int]):
    page = open_page(size, scheme)
    page.wait_for_selector(".example")
    assert (accessibility_violations(page), fits_width(page)) == ([], True)
    screenshot(page, f"empty-{device}-{scheme}")
    attach(page, video)
    assert (accessibility_violations(page), fits_width(page)) == ([], True)
    screenshot(page, f"attached-{device}-{scheme}")
    ask_and_wait(page, QUESTION)
    ask_and_wait(
        page,
        "And then? {zoom 8 9 4} {zoom 30 40 1} {answer A word about it, or two, as long as an answer is}",
    )
    page.locator("article.exchange .frame-strip").nth(4).wait_for()
    assert (accessibility_violations(page), fits_width(page)) == ([], True)
    screenshot(page, f"done-{device}-{scheme}")
    page.get_by_role("button", name="Add video").click()
    assert (accessibility_violations(page), fits_width(page)) == ([], True)
    screenshot(page, f"adding-{device}-{scheme}")


def test_player_stays_visible_on_a_phone(open_page: OpenPage, video: Path):
    page = open_page(PHONE)
    attach(page, video)
    exchange = ask_and_wait(page, QUESTION)
    frame = exchange.get_by_role("button", name="Frame at 0:09")
    frame.scroll_into_view_if_needed()
    frame.click()
    wait_until(lambda: current_time(page) == 9.0, "9 s")
    box = page.locator("video").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] < PHONE["height"] / 2
    assert [bar.inner_text() for bar in page.locator(".tl-zoom").all()] == ["1", "2"]
