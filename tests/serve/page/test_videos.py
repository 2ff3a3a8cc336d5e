"""Videos in the web page: upload, drag and drop, earlier uploads, invalid files and URLs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.serve.live_server import LiveServer
from tests.serve.page.page_actions import (
    OpenPage,
    ask,
    ask_and_wait,
    attach,
    screenshot,
    wait_until,
)
from tests.video.sample_videos import VideoSpec, write_video

pytestmark = pytest.mark.slow


def test_upload_shows_eta_and_question_waits(open_page: OpenPage, video: Path):
    page = open_page()
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 20_000}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    page.set_input_files("input[type=file]", video)
    exchange = ask(page, "{answer B}")
    assert exchange.locator(".activity").inner_text() == "Waiting for the upload"
    status = page.locator(".video-status")
    wait_until(lambda: re.search(r"^Uploading \d+ % of 90 KB, \d+ s left$", status.inner_text()), "time left")
    screenshot(page, "uploading")
    exchange.locator("dl.facts").wait_for()
    assert exchange.locator(".answer").inner_text() == "B"


def test_files_can_be_dropped_anywhere(open_page: OpenPage, video: Path):
    page = open_page()
    page.evaluate(
        """(bytes) => {
             const dataTransfer = new DataTransfer();
             dataTransfer.items.add(new File([new Uint8Array(bytes)], "dropped.mp4", { type: "video/mp4" }));
             dataTransfer.items.add(new File(["x"], "notes.txt", { type: "text/plain" }));
             for (const kind of ["dragover", "drop"])
               document.querySelector("header").dispatchEvent(
                 new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
           }""",
        list(video.read_bytes()),
    )
    page.locator("li.video .video-status", has_text="KB").wait_for()
    assert page.locator("li.video .video-name").all_text_contents() == ["dropped.mp4"]
    assert page.locator("#composer-error", has_text="notes.txt: not a video.").is_visible()


def test_unplayable_video_shows_frames(open_page: OpenPage, server: tuple[LiveServer, str]):
    page = open_page()
    attach(page, write_video(server[0].folder, VideoSpec("old.avi", codec="mpeg4", frames=200)))
    page.get_by_text("This browser does not support the video format; the agent does.").wait_for()
    exchange = ask_and_wait(page, "{zoom 2 4 2} {answer B}")
    frame = exchange.get_by_role("button", name="Frame at 0:03.5")
    frame.click()
    assert page.locator(".frame-image").get_attribute("src") == frame.locator("img").get_attribute("src")
    assert page.locator(".frame-image").evaluate("image => image.naturalWidth > 0")
    screenshot(page, "unplayable")


def test_too_large_file_shows_an_error(open_page: OpenPage, tmp_path: Path):
    page = open_page(refused=1)
    (tmp_path / "large.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(3_000_000))
    page.set_input_files("input[type=file]", tmp_path / "large.mp4")
    page.locator("li.video.failed", has_text="larger than").wait_for()
    assert not page.get_by_role("button", name="Try again").is_visible()


def test_invalid_video_shows_an_error(open_page: OpenPage, tmp_path: Path, video: Path):
    page = open_page(refused=1)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypmp42" + b"x" * 3000)
    page.set_input_files("input[type=file]", broken)
    page.locator("li.video.failed").wait_for()
    assert "not a video" in page.locator("li.video").inner_text()
    assert not page.get_by_role("button", name="Try again").is_visible()
    attach(page, video)
    ask(page, "What? {answer B}")
    assert "broken.mp4 is not on the server" in page.locator("#composer-error").inner_text()
    assert page.input_value("#question") == "What? {answer B}"
    screenshot(page, "broken-upload")
    page.get_by_role("button", name="Remove broken.mp4").click()
    page.locator("#ask").click()
    page.locator("dl.facts").wait_for()


def test_forbidden_url_shows_an_error(open_page: OpenPage):
    page = open_page(refused=1)
    page.get_by_label("By address").fill("http://127.0.0.1:9/talks/one.mp4")
    page.keyboard.press("Enter")
    exchange = ask(page, "What?")
    alert = exchange.get_by_role("alert")
    alert.wait_for()
    assert "cannot open this address" in alert.inner_text()
    assert alert.get_by_role("button").count() == 0
    page.get_by_role("button", name="Remove one.mp4").click()
    screenshot(page, "address")
