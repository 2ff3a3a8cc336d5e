"""Errors of the server and the login dialog in the web page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.browser import accessibility_violations
from tests.serve.live_server import LiveServer
from tests.serve.page.page_actions import (
    OpenPage,
    ask,
    ask_and_wait,
    attach,
    screenshot,
    wait_until,
)

pytestmark = pytest.mark.slow


def test_overload_shows_a_countdown(open_page: OpenPage, video: Path):
    """The response is a stub: filling a real queue takes 100 requests."""
    page = open_page(refused=1)
    attach(page, video)
    error = {
        "message": "64 requests are waiting already; try again later.",
        "type": "server_error",
        "code": "overloaded",
    }
    full = {"status": 503, "headers": {"retry-after": "7"}, "json": {"error": error}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**full), times=1)
    exchange = ask(page, "{answer B}")
    assert "64 requests are waiting" in exchange.get_by_role("alert").inner_text()
    assert re.search("best in [67] s", exchange.inner_text())
    screenshot(page, "overloaded")
    within = {"status": 200, "content_type": "text/event-stream"}
    body = f"retry: 3000\ndata: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**within, body=body), times=1)
    exchange.get_by_role("button", name="Try again").click()
    wait_until(lambda: re.search("best in [23] s", page.locator("article.exchange").inner_text()), "3 s")
    page.get_by_role("button", name="Try again").click()
    page.locator("dl.facts").wait_for()
    assert page.locator("article.exchange").count() == 1
    assert page.locator(".answer").inner_text() == "B"


def test_unreachable_server_shows_an_error(open_page: OpenPage, video: Path):
    page = open_page(refused=1)
    attach(page, video)
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    exchange = ask(page, "{answer B}")
    assert "The server does not respond" in exchange.get_by_role("alert").inner_text()
    assert exchange.get_by_role("button", name="Try again").is_visible()


def test_login_dialog_appears_once(open_page: OpenPage, server: tuple[LiveServer, str], video: Path):
    page = open_page(key=False, refused=1)
    box = page.get_by_role("dialog", name="This server requires an API key")
    box.wait_for()
    assert accessibility_violations(page) == []
    screenshot(page, "key")
    page.keyboard.type("vz-wrong")
    page.keyboard.press("Enter")
    box.get_by_text("not valid").wait_for()
    page.keyboard.type(server[1])
    page.keyboard.press("Enter")
    box.wait_for(state="detached")
    page.wait_for_selector("#model:has-text('zoomer@1')")
    attach(page, video)
    assert ask_and_wait(page, "{answer B}").locator(".answer").inner_text() == "B"
    page.get_by_role("button", name="Sign out").click()
    box.wait_for()


def test_expired_session_logs_in_and_continues(open_page: OpenPage, server: tuple[LiveServer, str], video: Path):
    page = open_page(refused=1)
    attach(page, video)
    page.context.clear_cookies()
    exchange = ask(page, "{answer B}")
    box = page.get_by_role("dialog", name="This server requires an API key")
    box.wait_for()
    page.keyboard.type(server[1])
    page.keyboard.press("Enter")
    exchange.locator("dl.facts").wait_for()
    assert exchange.locator(".answer").inner_text() == "B"
