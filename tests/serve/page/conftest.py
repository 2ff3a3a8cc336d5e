"""One server behind an API key for all tests of this folder. Its agent follows scripted directives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.live_server import LiveServer, live_server, tiny_serve_config
from tests.serve.page.page_actions import DESKTOP, OpenPage, Page
from vz_ray.serve.api_keys import add_key, generate_key


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, str]]:
    """Server with an API key, and the key; bodies over 1 MiB are rejected."""
    folder = tmp_path_factory.mktemp("page")
    secret, key = generate_key("alice")
    add_key(folder / "keys.json", key)
    access = {"access.keys_file": folder / "keys.json", "access.max_upload_gib": 0.001}
    with live_server(tiny_serve_config(folder, **access), folder) as live:
        yield live, secret


@pytest.fixture
def open_page(chromium: Any, server: tuple[LiveServer, str]) -> Iterator[OpenPage]:
    """Open the page, logged in by default. The console must stay empty.

    Chromium logs each response with a status of 400 or above; `refused` is the expected number of them.
    """
    console: list[str] = []
    contexts: list[Any] = []
    num_expected_errors = 0

    def make_page(size: dict[str, int] = DESKTOP, scheme: str = "light", *, key: bool = True, refused: int = 0) -> Page:
        nonlocal num_expected_errors
        live, secret = server
        num_expected_errors = refused
        context = chromium.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        context.set_default_timeout(30_000)
        contexts.append(context)
        if key:
            response = context.request.post(f"{live.url}/session", data={"key": secret})
            assert response.ok
        page = context.new_page()
        page.on("console", lambda message: console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto(live.url)
        if key:
            page.wait_for_selector("#model:has-text('zoomer@1')")
        return page

    yield make_page
    for context in contexts:
        context.close()
    load_errors = [text for text in console if text.startswith("Failed to load resource")]
    assert [text for text in console if text not in load_errors] == []
    assert len(load_errors) == num_expected_errors, load_errors


@pytest.fixture
def video(server: tuple[LiveServer, str]) -> Path:
    return server[0].video
