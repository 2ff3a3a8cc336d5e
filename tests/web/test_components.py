"""Shared web components in a minimal page: timeline and frame strip."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vz_ray.web import load_asset

TYPES = {"js": "text/javascript", "css": "text/css"}
PAGE = """<!doctype html><html lang="en"><title>Components</title><link rel="stylesheet" href="/base.css">
<link rel="stylesheet" href="/components.css"><body><main></main><script type="module" src="/test.js"></script>"""
SCRIPT = """
import * as dom from "/dom.js"; import { timeline } from "/timeline.js"; import { frameStrip } from "/frame_strip.js";
Object.assign(window, { dom, timeline, frameStrip, main: document.querySelector("main"), seeks: [] });
"""


class AssetHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        body, kind = PAGE, "text/html"
        if name:
            body, kind = SCRIPT if name == "test.js" else load_asset(name), TYPES[name.rpartition(".")[2]]
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def page(chromium: Any) -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), AssetHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    opened = chromium.new_page(viewport={"width": 800, "height": 600})
    opened.goto(f"http://127.0.0.1:{server.server_port}/")
    opened.wait_for_function("window.frameStrip !== undefined")
    yield opened
    server.shutdown()


@pytest.fixture(autouse=True)
def empty(page: Any) -> None:
    page.evaluate("main.replaceChildren(); window.seeks = []")


def draw(page: Any, component: str, **options: Any) -> None:
    """Create `window.component`; it records its seek calls in `window.seeks`."""
    seek = "onSeek: (s, z) => seeks.push([s, z?.turn ?? null])"
    page.evaluate(
        f"window.component = {component}({{...{json.dumps(options)}, {seek}}}); main.append(component.element)"
    )


def boxes(page: Any, selector: str) -> list[list[float]]:
    """Return left and right edges as fractions of the track."""
    return page.evaluate(  # type: ignore[no-any-return]
        """(selector) => { const track = document.querySelector(".tl-track").getBoundingClientRect();
        return [...document.querySelectorAll(selector)].map((e) => { const box = e.getBoundingClientRect();
        return [(box.left - track.left) / track.width, (box.right - track.left) / track.width]; }); }""",
        selector,
    )


ZOOM = {"turn": 1, "start": 25, "end": 50, "fps": 4}


def test_bars_events_and_ticks_are_at_their_times(page: Any) -> None:
    draw(page, "timeline", duration=100, ticks=[0, 50], events=[[10, 20]], zooms=[ZOOM])
    assert boxes(page, ".tl-zoom") == [pytest.approx([0.25, 0.5], abs=2e-3)]
    assert boxes(page, ".tl-event") == [pytest.approx([0.1, 0.2], abs=2e-3)]
    assert [left for left, _ in boxes(page, ".tl-tick")] == pytest.approx([0, 0.5], abs=2e-3)
    assert page.locator(".tl-scale").inner_text().split() == ["0:00", "0:25", "0:50", "1:15", "1:40"]


def test_bars_can_be_added_and_duration_updated(page: Any) -> None:
    draw(page, "timeline", duration=100)
    group = page.get_by_role("group")
    assert group.get_attribute("aria-label") == "Timeline of 1:40: 0 zooms, 0 events"
    for turn in (1, 2):
        page.evaluate(f"component.add({json.dumps({**ZOOM, 'turn': turn})})")
    assert page.locator(".tl-zoom").count() == 2
    assert group.get_attribute("aria-label") == "Timeline of 1:40: 2 zooms, 0 events"
    page.evaluate("component.setDuration(200)")
    assert boxes(page, ".tl-zoom") == [pytest.approx([0.125, 0.25], abs=2e-3)] * 2
    assert group.get_attribute("aria-label").startswith("Timeline of 3:20: ")


def test_bars_are_buttons_that_seek(page: Any) -> None:
    draw(page, "timeline", duration=100, zooms=[{**ZOOM, "video": "b.mp4"}])
    button = page.get_by_role("button", name="Turn 1: 0:25 to 0:50 of b.mp4 at 4 fps")
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("seeks") == [[25, 1]]
    track = page.locator(".tl-track")
    box = track.bounding_box()
    track.click(position={"x": box["width"] * 0.75, "y": 6})
    (seconds, zoom) = page.evaluate("seeks")[1]
    assert (seconds, zoom) == (pytest.approx(75, abs=0.5), None)


def test_zoom_beyond_the_end_stays_on_the_track(page: Any) -> None:
    draw(
        page,
        "timeline",
        duration=100,
        zooms=[{**ZOOM, "start": 90, "end": 500}, {**ZOOM, "start": 400, "end": 500}],
    )
    for left, right in boxes(page, ".tl-zoom"):
        assert 0.89 < left <= 1
        assert right <= 1.01


def test_refused_zoom_is_drawn_with_reason(page: Any) -> None:
    refused = {"refused": "segment is outside"}
    outside = {**ZOOM, "turn": 2, "start": 120, "end": 150, **refused}
    back = {**ZOOM, "turn": 3, "start": 40, "end": 20, **refused}
    before = {**ZOOM, "turn": 4, "start": -5, "end": 10, **refused}
    draw(page, "timeline", duration=100, zooms=[ZOOM, outside, back, before])
    states = [bar.get_attribute("data-state") for bar in page.locator(".tl-zoom").all()]
    assert states == ["", "refused", "refused", "refused"]
    label = page.get_by_role("group").get_attribute("aria-label")
    assert label == "Timeline of 1:40: 1 zoom and 3 refused, 0 events"
    _, beyond, reversed_, early = boxes(page, ".tl-zoom")
    assert 0.98 < beyond[0] < beyond[1] <= 1.001
    assert reversed_ == pytest.approx([0.2, 0.4], abs=2e-3)
    assert early == pytest.approx([0, 0.1], abs=2e-3)
    names = [bar.get_attribute("aria-label") for bar in page.locator(".tl-zoom").all()]
    assert names[1] == "Turn 2: 2:00 to 2:30 at 4 fps, refused: segment is outside"
    assert names[3] == "Turn 4: -0:05 to 0:10 at 4 fps, refused: segment is outside"
    page.locator(".tl-zoom").nth(3).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("seeks") == [[0, 4]]


def test_pending_zoom_can_become_refused(page: Any) -> None:
    draw(page, "timeline", duration=100)
    page.evaluate(f"window.bar = component.add({json.dumps(ZOOM)}, 'pending')")
    page.evaluate("bar.settle('refused', 'no room is left')")
    assert page.locator(".tl-zoom").get_attribute("title").endswith("at 4 fps, refused: no room is left")
    assert page.get_by_role("group").get_attribute("aria-label").startswith("Timeline of 1:40: 0 zooms and 1 ref")


def test_compact_timeline_separates_overlapping_bars(page: Any) -> None:
    zooms = [{**ZOOM, "turn": k + 1, "start": start, "end": start + 20} for k, start in enumerate((0, 10, 40))]
    draw(page, "timeline", duration=100, zooms=zooms, compact=True)
    tops = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.tl-zoom')].map("
        "(e) => [e.textContent, e.getBoundingClientRect().top]))"
    )
    assert tops["1"] == tops["3"] < tops["2"]


def test_player_position_is_shown_and_hidden(page: Any) -> None:
    draw(page, "timeline", duration=100)
    assert page.locator(".tl-playhead").is_hidden()
    page.evaluate("component.setNow(50)")
    left, right = boxes(page, ".tl-playhead")[0]
    assert (left + right) / 2 == pytest.approx(0.5, abs=3e-3)
    page.evaluate("component.setNow(null)")
    assert page.locator(".tl-playhead").is_hidden()


def test_strip_shows_times_then_images_or_error(page: Any) -> None:
    draw(page, "frameStrip", times=[0, 4, 8.5], events=[[4, 5]], width=56, height=28, numOmitted=7)
    assert page.locator(".frame-strip time").all_inner_texts() == ["0:00", "0:04", "0:08.5"]
    assert page.locator(".frame-strip.tiny").count() == 1
    assert page.get_by_role("button", name="Frame at 0:04, in the event").count() == 1
    assert "and 7 more" in page.locator(".frame-strip").inner_text()
    dot = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    page.evaluate(f"component.show(['{dot}', '{dot}', '{dot}'])")
    assert page.locator(".frame-strip img").count() == 3
    page.evaluate("component.setNow(5)")
    assert page.locator(".frame-strip .current time").inner_text() == "0:04"
    page.get_by_role("button", name="Frame at 0:08.5").click()
    assert page.evaluate("seeks") == [[8.5, None]]
    page.evaluate("component.fail('the video is gone')")
    assert page.locator(".frame-strip-error").inner_text() == "the video is gone"
    assert page.locator(".frame-strip .frame").first.is_hidden()


def test_text_is_never_markup(page: Any) -> None:
    page.evaluate("main.append(dom.el('p', { title: '<b>' }, '<b>bold</b>'))")
    assert page.locator("main b").count() == 0
    assert page.locator("main p").inner_text() == "<b>bold</b>"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00"),
        (75.5, "1:15.5"),
        (59.96, "1:00"),
        (9.04, "0:09"),
        (3600, "1:00:00"),
        (3725.3, "1:02:05.3"),
        (-75.5, "-1:15.5"),
    ],
)
def test_clock_format_matches_the_report(page: Any, seconds: float, expected: str) -> None:
    from vz_ray.report.markup import format_clock

    assert page.evaluate(f"dom.clock({seconds})") == expected == format_clock(seconds)
