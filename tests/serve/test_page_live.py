"""The web page in Chromium with a complete server behind an API key. The agent follows scripted directives.

All tests are in one module to share the server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.live_server import LiveServer, live_server, tiny_serve_config
from tests.serve.page_actions import (
    DESKTOP,
    PHONE,
    Page,
    accessibility_violations,
    ask,
    ask_and_wait,
    attach,
    current_time,
    fits_width,
    screenshot,
    wait_until,
)
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.serve.api_keys import add_key, generate_key

pytestmark = pytest.mark.slow

QUESTION = "What flashes? {think 12} {zoom 2 4 2} {zoom 6 10 1} {answer B} A. disc B. ring C. cross"
LONG = "".join(f"{{think 18}} {{zoom {start} {start + 4} 2}} " for start in (0, 4, 8, 2)) + "{answer A}"
MAX_UPLOAD_GIB = 0.001
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, str]]:
    """Server with an API key, and the key; bodies over 1 MiB are rejected."""
    folder = tmp_path_factory.mktemp("page")
    secret, key = generate_key("alice")
    add_key(folder / "keys.json", key)
    more = {"access.keys_file": folder / "keys.json", "access.max_upload_gib": MAX_UPLOAD_GIB}
    with live_server(tiny_serve_config(folder, **more), folder) as live:
        yield live, secret


@pytest.fixture
def opened(chromium: Any, server: tuple[LiveServer, str]) -> Iterator[Open]:
    """Open the page, logged in by default. The console must stay empty.

    Chromium logs each response with a status of 400 or above; `refused` is the expected number of them.
    """
    console: list[str] = []
    contexts, wanted = [], [0]

    def make_page(size: dict[str, int] = DESKTOP, scheme: str = "light", *, key: bool = True, refused: int = 0) -> Page:
        live, secret = server
        wanted[0] = refused
        context = chromium.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        context.set_default_timeout(30_000)
        contexts.append(context)
        if key:
            answer = context.request.post(f"{live.url}/session", data={"key": secret})
            assert answer.ok
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
    notes = [text for text in console if text.startswith("Failed to load resource")]
    assert [text for text in console if text not in notes] == []
    assert len(notes) == wanted[0], notes


@pytest.fixture
def video(server: tuple[LiveServer, str]) -> Path:
    return server[0].video


# -- asking ---------------------------------------------------------------------------


def test_answer_shows_frames_of_the_agent(opened: Open, video: Path):
    page = opened()
    attach(page, video)
    # An observer in the page records the bars, because the first may be complete too early for the test.
    page.evaluate(
        """() => {
             window.bars = [];
             const note = (bar) => window.bars.push(`${bar.getAttribute('aria-label')}|${bar.dataset.state}`);
             const lanes = document.getElementById('lanes');
             new MutationObserver(() => lanes.querySelectorAll('.tl-zoom').forEach(note))
               .observe(lanes, { subtree: true, childList: true, attributes: true });
           }"""
    )
    round_element = ask_and_wait(page, QUESTION)
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
    strips = round_element.locator(".strip")
    wait_until(lambda: strips.count() == 3, "three strips")
    times = [strip.locator("time").all_text_contents() for strip in strips.all()]
    assert times[1] == ["0:02", "0:02.5", "0:03", "0:03.5"]
    assert times[2] == ["0:06", "0:07", "0:08", "0:09"]
    assert all(round_element.locator(".strip img").evaluate_all("all => all.map((one) => one.naturalWidth > 0)"))
    assert round_element.locator(".thought").all_text_contents() == [" ".join(["see"] * 12), "see", "see"]
    assert round_element.locator(".answer").text_content().split() == ["B", "ring"]
    assert round_element.locator(".options .chosen").inner_text().split() == ["B", "ring"]
    facts = dict(
        zip(
            round_element.locator("dt").all_text_contents(),
            round_element.locator("dd").all_text_contents(),
            strict=True,
        )
    )
    assert (facts["frames"], facts["zooms"], facts["model"]) == ("14", "2", "zoomer@1")
    assert float(facts["time"].removesuffix(" s")) > 0
    assert int(facts["tokens"]) > 14
    assert page.get_by_role("status").inner_text() == "Answer: B ring"
    screenshot(page, "answered")


def test_click_on_frame_or_bar_seeks(opened: Open, video: Path):
    page = opened()
    attach(page, video)
    round_element = ask_and_wait(page, QUESTION)
    round_element.get_by_role("button", name="Frame at 0:07").click()
    # The video has 25 frames per second, so there is a frame at 7 s.
    wait_until(lambda: current_time(page) == 7.0, "7 s")
    assert round_element.locator(".strip").nth(2).locator("li.at time").inner_text() == "0:07"
    page.get_by_role("button", name="Turn 1: 0:02 to 0:04 at 2 fps").click()
    wait_until(lambda: current_time(page) == 2.0, "2 s")
    page.locator(".tl-overview").click(position={"x": 5, "y": 10})
    wait_until(lambda: current_time(page) < 0.5, "the beginning")
    assert page.evaluate("document.querySelector('video').src").startswith("blob:")
    assert page.evaluate("document.querySelector('video').error") is None


def test_follow_up_sends_the_history(opened: Open, video: Path):
    page = opened()
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


def test_each_video_has_a_timeline(opened: Open, server: tuple[LiveServer, str], video: Path):
    page = opened()
    attach(page, video, write_video(server[0].folder, VideoSpec("w.mp4", frames=100)))
    round_element = ask_and_wait(page, "{zoom 1 3 2 2} {answer B}")
    bar = page.get_by_role("button", name="Turn 1: 0:01 to 0:03 at 2 fps")
    assert "w.mp4" in page.locator(".lane", has=bar).inner_text()
    assert "of w.mp4" in round_element.locator(".step", has_text="Turn 1").inner_text()
    bar.click()
    wait_until(lambda: page.evaluate("document.querySelector('video').duration") == 4.0, "the second video")
    wait_until(lambda: current_time(page) == 1.0, "1 s")
    screenshot(page, "two-videos")


def test_earlier_upload_plays_from_the_server(opened: Open, video: Path):
    page = opened()
    attach(page, video)
    page.reload()
    page.locator(".shelf-use").first.click()
    wait_until(lambda: page.evaluate("document.querySelector('video').duration") == 12.0, "12 s")
    round_element = ask_and_wait(page, "{zoom 6 10 1} {answer B}")
    round_element.get_by_role("button", name="Frame at 0:09").click()
    wait_until(
        lambda: current_time(page) == 9.0 and not page.evaluate("document.querySelector('video').seeking"),
        "9 s",
    )
    assert re.search(r"/v1/files/file-\w+/content$", page.evaluate("document.querySelector('video').currentSrc"))
    page.get_by_role("button", name="New chat").click()
    before = page.locator(".shelf-use").count()
    page.locator(".shelf .icon").first.click()
    page.get_by_role("button", name="Delete v.mp4 from the server").filter(has_text="Delete?").click()
    wait_until(lambda: page.locator(".shelf-use").count() == before - 1, "one file less")


def test_zoom_limit_control(opened: Open, video: Path):
    page = opened()
    attach(page, video)
    page.locator("#zooms").select_option("none")
    round_element = ask_and_wait(page, QUESTION)
    [bar] = page.locator(".tl-zoom").all()
    assert bar.get_attribute("data-state") == "refused"
    assert bar.get_attribute("aria-label").startswith("Turn 1: 0:02 to 0:04 at 2 fps, refused: no zoom is left")
    assert "Refused" in round_element.locator(".step").nth(1).inner_text()
    assert "gave no answer" in round_element.locator(".foot").inner_text()
    screenshot(page, "refused")


# -- stopping, starting again ------------------------------------------------------------


def in_progress(page: Page, url: str) -> float:
    text = page.request.get(f"{url}/metrics").text()
    line = next(line for line in text.splitlines() if line.startswith("vz_ray_requests_in_progress"))
    return float(line.split()[-1])


def test_stop_frees_the_server(opened: Open, server: tuple[LiveServer, str], video: Path):
    page = opened()
    attach(page, video)
    round_element = ask(page, LONG)
    round_element.locator(".look").wait_for()
    page.keyboard.press("Escape")
    round_element.get_by_text("Stopped. It is not part of the chat.").wait_for()
    assert round_element.locator(".answer").is_hidden()
    wait_until(lambda: in_progress(page, server[0].url) == 0, "no request under way")
    assert page.locator("#ask").is_visible()
    round_element.get_by_role("button", name="Ask again").click()
    page.locator(".look").wait_for()
    screenshot(page, "streaming")
    page.locator("dl.facts").wait_for()
    assert page.locator("article.round").count() == 1
    assert page.locator(".answer").inner_text() == "A"


def test_new_chat_is_empty(opened: Open, video: Path):
    page = opened()
    attach(page, video)
    ask_and_wait(page, "{answer B}")
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article.round, li.video").count() == 0
    assert page.get_by_role("heading", name="Ask about a video").is_visible()
    assert page.get_by_role("button", name="Choose a video").evaluate("one => one === document.activeElement")


# -- videos ---------------------------------------------------------------------------------


def test_upload_shows_eta_and_question_waits(opened: Open, video: Path):
    page = opened()
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 20_000}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    page.set_input_files("input[type=file]", video)
    round_element = ask(page, "{answer B}")
    assert round_element.locator(".state").inner_text() == "Waiting for the upload"
    words = page.locator(".video-words")
    wait_until(lambda: re.search(r"^Uploading \d+ % of 90 KB, \d+ s left$", words.inner_text()), "time left")
    screenshot(page, "uploading")
    round_element.locator("dl.facts").wait_for()
    assert round_element.locator(".answer").inner_text() == "B"


def test_files_can_be_dropped_anywhere(opened: Open, video: Path):
    page = opened()
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
    page.locator("li.video .video-words", has_text="KB").wait_for()
    assert page.locator("li.video .video-name").all_text_contents() == ["dropped.mp4"]
    assert page.locator("#missing", has_text="notes.txt: not a video.").is_visible()


def test_unplayable_video_shows_frames(opened: Open, server: tuple[LiveServer, str]):
    page = opened()
    attach(page, write_video(server[0].folder, VideoSpec("old.avi", codec="mpeg4", frames=200)))
    page.get_by_text("This browser does not support the video format; the agent does.").wait_for()
    round_element = ask_and_wait(page, "{zoom 2 4 2} {answer B}")
    frame = round_element.get_by_role("button", name="Frame at 0:03.5")
    frame.click()
    assert page.locator(".still").get_attribute("src") == frame.locator("img").get_attribute("src")
    assert page.locator(".still").evaluate("one => one.naturalWidth > 0")
    screenshot(page, "unplayable")


# -- what goes wrong ----------------------------------------------------------------------


def test_too_large_file_shows_an_error(opened: Open, tmp_path: Path):
    page = opened(refused=1)
    (tmp_path / "large.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(3_000_000))
    page.set_input_files("input[type=file]", tmp_path / "large.mp4")
    page.locator("li.video.failed", has_text="larger than").wait_for()
    assert not page.get_by_role("button", name="Try again").is_visible()


def test_invalid_video_shows_an_error(opened: Open, tmp_path: Path, video: Path):
    page = opened(refused=1)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypmp42" + b"x" * 3000)
    page.set_input_files("input[type=file]", broken)
    page.locator("li.video.failed").wait_for()
    assert "not a video" in page.locator("li.video").inner_text()
    assert not page.get_by_role("button", name="Try again").is_visible()
    attach(page, video)
    ask(page, "What? {answer B}")
    assert "broken.mp4 is not on the server" in page.locator("#missing").inner_text()
    assert page.input_value("#question") == "What? {answer B}"
    screenshot(page, "broken-upload")
    page.get_by_role("button", name="Remove broken.mp4").click()
    page.locator("#ask").click()
    page.locator("dl.facts").wait_for()


def test_forbidden_url_shows_an_error(opened: Open):
    page = opened(refused=1)
    page.get_by_label("By address").fill("http://127.0.0.1:9/talks/one.mp4")
    page.keyboard.press("Enter")
    round_element = ask(page, "What?")
    alert = round_element.get_by_role("alert")
    alert.wait_for()
    assert "cannot be opened" in alert.inner_text()
    assert alert.get_by_role("button").count() == 0
    page.get_by_role("button", name="Remove one.mp4").click()
    screenshot(page, "address")


def test_overload_shows_a_countdown(opened: Open, video: Path):
    """The response is a stub: filling a real queue takes 100 requests."""
    page = opened(refused=1)
    attach(page, video)
    error = {
        "message": "64 requests are waiting already; try again later.",
        "type": "server_error",
        "code": "overloaded",
    }
    full = {"status": 503, "headers": {"retry-after": "7"}, "json": {"error": error}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**full), times=1)
    round_element = ask(page, "{answer B}")
    assert "64 requests are waiting" in round_element.get_by_role("alert").inner_text()
    assert re.search("best in [67] s", round_element.inner_text())
    screenshot(page, "overloaded")
    within = {"status": 200, "content_type": "text/event-stream"}
    body = f"retry: 3000\ndata: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**within, body=body), times=1)
    round_element.get_by_role("button", name="Try again").click()
    wait_until(lambda: re.search("best in [23] s", page.locator("article.round").inner_text()), "3 s")
    page.get_by_role("button", name="Try again").click()
    page.locator("dl.facts").wait_for()
    assert page.locator("article.round").count() == 1
    assert page.locator(".answer").inner_text() == "B"


def test_unreachable_server_shows_an_error(opened: Open, video: Path):
    page = opened(refused=1)
    attach(page, video)
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    round_element = ask(page, "{answer B}")
    assert "The server does not respond" in round_element.get_by_role("alert").inner_text()
    assert round_element.get_by_role("button", name="Try again").is_visible()


def test_login_dialog_appears_once(opened: Open, server: tuple[LiveServer, str], video: Path):
    page = opened(key=False, refused=1)
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


def test_expired_session_logs_in_and_continues(opened: Open, server: tuple[LiveServer, str], video: Path):
    page = opened(refused=1)
    attach(page, video)
    page.context.clear_cookies()
    round_element = ask(page, "{answer B}")
    box = page.get_by_role("dialog", name="This server requires an API key")
    box.wait_for()
    page.keyboard.type(server[1])
    page.keyboard.press("Enter")
    round_element.locator("dl.facts").wait_for()
    assert round_element.locator(".answer").inner_text() == "B"


# -- for everyone -------------------------------------------------------------------------------


def test_keyboard_only_use(opened: Open, video: Path):
    page = opened()
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
    page.locator("li.video .video-words", has_text="KB").wait_for()
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
@pytest.mark.parametrize(("page_state", "size"), [("desk", DESKTOP), ("phone", PHONE)])
def test_accessibility_at_all_sizes(opened: Open, video: Path, scheme: str, page_state: str, size: dict[str, int]):
    page = opened(size, scheme)
    page.wait_for_selector(".example")
    assert (accessibility_violations(page), fits_width(page)) == ([], True)
    screenshot(page, f"empty-{page_state}-{scheme}")
    attach(page, video)
    assert (accessibility_violations(page), fits_width(page)) == ([], True)
    screenshot(page, f"attached-{page_state}-{scheme}")
    ask_and_wait(page, QUESTION)
    ask_and_wait(
        page,
        "And then? {zoom 8 9 4} {zoom 30 40 1} {answer A word about it, or two, as long as an answer is}",
    )
    page.locator("article.round .strip").nth(4).wait_for()
    assert (accessibility_violations(page), fits_width(page)) == ([], True)
    screenshot(page, f"done-{page_state}-{scheme}")
    page.get_by_role("button", name="Add video").click()
    assert (accessibility_violations(page), fits_width(page)) == ([], True)
    screenshot(page, f"adding-{page_state}-{scheme}")


def test_player_stays_visible_on_a_phone(opened: Open, video: Path):
    page = opened(PHONE)
    attach(page, video)
    round_element = ask_and_wait(page, QUESTION)
    frame = round_element.get_by_role("button", name="Frame at 0:09")
    frame.scroll_into_view_if_needed()
    frame.click()
    wait_until(lambda: current_time(page) == 9.0, "9 s")
    box = page.locator("video").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] < PHONE["height"] / 2
    assert [bar.inner_text() for bar in page.locator(".tl-zoom").all()] == ["1", "2"]
