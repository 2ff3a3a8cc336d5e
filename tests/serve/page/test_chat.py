"""Questions, answers, zooms, follow-ups and stopping in the web page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Page
from tests.serve.live_server import LiveServer
from tests.serve.page.page_actions import (
    QUESTION,
    OpenPage,
    ask,
    ask_and_wait,
    attach,
    current_time,
    screenshot,
    wait_until,
)
from tests.video.sample_videos import VideoSpec, write_video

pytestmark = pytest.mark.slow
LONG = "".join(f"{{think 18}} {{zoom {start} {start + 4} 2}} " for start in (0, 4, 8, 2)) + "{answer A}"


def test_answer_shows_frames_of_the_agent(open_page: OpenPage, video: Path):
    page = open_page()
    attach(page, video)
    # An observer in the page records the bars, because the first may be complete too early for the test.
    page.evaluate(
        """() => {
             window.bars = [];
             const note = (bar) => window.bars.push(`${bar.getAttribute('aria-label')}|${bar.dataset.state}`);
             const timelines = document.getElementById('timelines');
             new MutationObserver(() => timelines.querySelectorAll('.tl-zoom').forEach(note))
               .observe(timelines, { subtree: true, childList: true, attributes: true });
           }"""
    )
    exchange = ask_and_wait(page, QUESTION)
    bars = page.evaluate("window.bars")
    assert "Turn 1: 0:02 to 0:04 at 2 fps, being decoded|pending" in bars
    assert bars.index("Turn 1: 0:02 to 0:04 at 2 fps, being decoded|pending") < bars.index(
        "Turn 1: 0:02 to 0:04 at 2 fps|"
    )
    assert [bar.get_attribute("aria-label") for bar in page.locator(".tl-zoom").all()] == [
        "Turn 1: 0:02 to 0:04 at 2 fps",
        "Turn 2: 0:06 to 0:10 at 1 fps",
    ]
    assert page.locator(".tl-tick").count() == 6
    strips = exchange.locator(".frame-strip")
    wait_until(lambda: strips.count() == 3, "three strips")
    times = [strip.locator("time").all_text_contents() for strip in strips.all()]
    assert times[1] == ["0:02", "0:02.5", "0:03", "0:03.5"]
    assert times[2] == ["0:06", "0:07", "0:08", "0:09"]
    assert all(exchange.locator(".frame-strip img").evaluate_all("all => all.map((image) => image.naturalWidth > 0)"))
    assert exchange.locator(".reasoning").all_text_contents() == [" ".join(["see"] * 12), "see", "see"]
    assert exchange.locator(".answer").text_content().split() == ["B", "ring"]
    assert exchange.locator(".options .chosen").inner_text().split() == ["B", "ring"]
    facts = dict(
        zip(
            exchange.locator("dt").all_text_contents(),
            exchange.locator("dd").all_text_contents(),
            strict=True,
        )
    )
    assert (facts["frames"], facts["zooms"], facts["model"]) == ("14", "2", "zoomer@1")
    assert float(facts["time"].removesuffix(" s")) > 0
    assert int(facts["tokens"]) > 14
    assert page.get_by_role("status").inner_text() == "Answer: B ring"
    screenshot(page, "answered")


def test_click_on_frame_or_bar_seeks(open_page: OpenPage, video: Path):
    page = open_page()
    attach(page, video)
    exchange = ask_and_wait(page, QUESTION)
    exchange.get_by_role("button", name="Frame at 0:07").click()
    # The video has 25 frames per second, so there is a frame at 7 s.
    wait_until(lambda: current_time(page) == 7.0, "7 s")
    assert exchange.locator(".frame-strip").nth(2).locator("li.current time").inner_text() == "0:07"
    page.get_by_role("button", name="Turn 1: 0:02 to 0:04 at 2 fps").click()
    wait_until(lambda: current_time(page) == 2.0, "2 s")
    page.locator(".tl-overview").click(position={"x": 5, "y": 10})
    wait_until(lambda: current_time(page) < 0.5, "the beginning")
    assert page.evaluate("document.querySelector('video').src").startswith("blob:")
    assert page.evaluate("document.querySelector('video').error") is None


def test_follow_up_sends_the_history(open_page: OpenPage, video: Path):
    page = open_page()
    attach(page, video)
    ask_and_wait(page, "What is it? {answer a disc}")
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request) if request.url.endswith("completions") else None)
    second = ask_and_wait(page, "Sure? {zoom 2 4 2} {answer yes}")
    assert second.locator(".answer").inner_text() == "yes"
    messages = json.loads(sent[0].post_data)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["file", "text"]
    assert messages[1:] == [
        {"role": "assistant", "content": "a disc"},
        {"role": "user", "content": "Sure? {zoom 2 4 2} {answer yes}"},
    ]
    assert page.locator(".tl-zoom").count() == 1
    page.get_by_role("button", name="Show on the timeline").click()
    assert page.locator(".tl-zoom").count() == 0
    screenshot(page, "follow-up")


def test_each_video_has_a_timeline(open_page: OpenPage, server: tuple[LiveServer, str], video: Path):
    page = open_page()
    attach(page, video, write_video(server[0].folder, VideoSpec("w.mp4", frames=100)))
    exchange = ask_and_wait(page, "{zoom 1 3 2 2} {answer B}")
    bar = page.get_by_role("button", name="Turn 1: 0:01 to 0:03 at 2 fps")
    assert "w.mp4" in page.locator(".video-timeline", has=bar).inner_text()
    assert "of w.mp4" in exchange.locator(".turn", has_text="Turn 1").inner_text()
    bar.click()
    wait_until(lambda: page.evaluate("document.querySelector('video').duration") == 4.0, "the second video")
    wait_until(lambda: current_time(page) == 1.0, "1 s")
    screenshot(page, "two-videos")


def count_files(page: Page, url: str) -> int:
    return len(page.request.get(f"{url}/v1/files").json()["data"])


def test_earlier_upload_plays_from_the_server(open_page: OpenPage, server: tuple[LiveServer, str], video: Path):
    page = open_page()
    attach(page, video)
    page.reload()
    page.locator(".upload-select").first.click()
    wait_until(lambda: page.evaluate("document.querySelector('video').duration") == 12.0, "12 s")
    exchange = ask_and_wait(page, "{zoom 6 10 1} {answer B}")
    exchange.get_by_role("button", name="Frame at 0:09").click()
    wait_until(
        lambda: current_time(page) == 9.0 and not page.evaluate("document.querySelector('video').seeking"),
        "9 s",
    )
    assert re.search(r"/v1/files/file-\w+/content$", page.evaluate("document.querySelector('video').currentSrc"))
    page.get_by_role("button", name="New chat").click()
    num_files = count_files(page, server[0].url)
    page.locator(".upload-list .icon-button").first.click()
    page.get_by_role("button", name="Delete v.mp4 from the server").filter(has_text="Delete?").click()
    wait_until(lambda: count_files(page, server[0].url) == num_files - 1, "one file less")


def test_zoom_limit_control(open_page: OpenPage, video: Path):
    page = open_page()
    attach(page, video)
    page.locator("#zoom-limit").select_option("none")
    exchange = ask_and_wait(page, QUESTION)
    [bar] = page.locator(".tl-zoom").all()
    assert bar.get_attribute("data-state") == "refused"
    assert bar.get_attribute("aria-label").startswith("Turn 1: 0:02 to 0:04 at 2 fps, refused: no zoom is left")
    assert "Refused" in exchange.locator(".turn").nth(1).inner_text()
    assert "gave no answer" in exchange.locator(".exchange-footer").inner_text()
    screenshot(page, "refused")


def in_progress(page: Page, url: str) -> float:
    text = page.request.get(f"{url}/metrics").text()
    line = next(line for line in text.splitlines() if line.startswith("vz_ray_requests_in_progress"))
    return float(line.split()[-1])


def test_stop_frees_the_server(open_page: OpenPage, server: tuple[LiveServer, str], video: Path):
    page = open_page()
    attach(page, video)
    exchange = ask(page, LONG)
    exchange.locator(".overview").wait_for()
    page.keyboard.press("Escape")
    exchange.get_by_text("Stopped. It is not part of the chat.").wait_for()
    assert exchange.locator(".answer").is_hidden()
    wait_until(lambda: in_progress(page, server[0].url) == 0, "no request under way")
    assert page.locator("#ask").is_visible()
    exchange.get_by_role("button", name="Ask again").click()
    page.locator(".overview").wait_for()
    screenshot(page, "streaming")
    page.locator("dl.facts").wait_for()
    assert page.locator("article.exchange").count() == 1
    assert page.locator(".answer").inner_text() == "A"


def test_new_chat_is_empty(open_page: OpenPage, video: Path):
    page = open_page()
    attach(page, video)
    ask_and_wait(page, "{answer B}")
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article.exchange, li.video").count() == 0
    assert page.get_by_role("heading", name="Ask about a video").is_visible()
    assert page.get_by_role("button", name="Choose a video").evaluate("button => button === document.activeElement")
