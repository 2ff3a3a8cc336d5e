"""Viewer page in a real Chromium: list, filters, episode, group, live updates, keyboard, phone, dark mode."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import PHONE, Page, accessibility_violations, fits_width, save_screenshot
from tests.report.viewer.conftest import served
from tests.report.viewer.run_factory import LightEpisode, light_line, write_light_run
from vz_ray.report.viewer.viewer_session import ViewerSession

DESKTOP = {"width": 1360, "height": 900}
SMALL = LightEpisode(frames=4, tokens=4)
FOCUSED = "document.activeElement.closest('.rows li')?.getAttribute('aria-posinset')"


@pytest.fixture(scope="module")
def address(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    session = ViewerSession(made_run, tmp_path_factory.mktemp("page") / "index.sqlite")
    session.follower.catch_up()
    with served(session) as url:
        yield url


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """Open pages; fail after the test if a page wrote to the console."""
    console_messages: list[str] = []
    contexts = []

    def make(url: str, size: dict[str, int] = DESKTOP, scheme: str = "light") -> Page:
        context = chromium.new_context(viewport=size, color_scheme=scheme)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: console_messages.append(message.text))
        page.on("pageerror", lambda error: console_messages.append(f"{error}\n{error.stack}"))
        page.goto(url)
        return page

    make.console_messages = console_messages  # type: ignore[attr-defined]
    yield make
    for context in contexts:
        context.close()
    assert console_messages == []


@contextlib.contextmanager
def open_page(opened: Any, session: ViewerSession) -> Iterator[Page]:
    """Open a page of a new server; close the page first, because it polls the server."""
    with served(session) as url:
        page = opened(url)
        yield page
        page.close()


def listed(page: Page) -> Page:
    page.wait_for_selector(".rows a")
    page.wait_for_selector(".charts figure")
    return page


def wait_until(page: Page, condition: str) -> None:
    """Wait for a JavaScript condition; the page's security policy blocks Playwright's `wait_for_function`."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never: {condition}"
        page.wait_for_timeout(50)


def wait_for_count(page: Page, count: int) -> None:
    wait_until(page, f"document.querySelector('.list-status').textContent.startsWith('{count:,} episode')")


def first_with(page: Page, zooms: int, address: str) -> str:
    """Return the address of the newest training episode with this number of zooms."""
    answer = page.request.get(f"{address}api/episodes?stage=train&zooms={zooms}&limit=1").json()
    return f"{address}#/episode/{answer['rows'][0]['id']}"


def screenshot(page: Page, name: str) -> None:
    save_screenshot(page, f"view-{name}")


# -- list ---------------------------------------------------------------------------


def test_list_is_filtered_and_sorted(opened: Any, address: str) -> None:
    page = listed(opened(address))
    wait_for_count(page, 54)
    page.get_by_label("Kind").select_option("count")
    count = page.request.get(f"{address}api/episodes?kind=count").json()["total"]
    assert 0 < count < 54
    wait_for_count(page, count)
    assert set(page.locator(".rows .kind").all_text_contents()) == {"count"}
    page.get_by_role("button", name="Sort by reward").click()
    wait_until(page, "location.hash.includes('sort=reward')")
    rewards = "[...document.querySelectorAll('.rows .reward')].map((e) => Number(e.textContent))"
    wait_until(page, f"{rewards}.every((r, k, all) => !k || all[k - 1] >= r)")
    assert len(set(page.evaluate(rewards))) > 1
    page.get_by_role("button", name="Clear").click()
    wait_for_count(page, 54)


def test_search_matches_questions(opened: Any, address: str) -> None:
    page = listed(opened(address))
    page.get_by_role("searchbox").fill("how many TIMES")
    count = page.request.get(f"{address}api/episodes?text=how+many+times").json()["total"]
    wait_for_count(page, count)
    page.get_by_role("searchbox").fill("nobody asked this")
    page.wait_for_selector("text=No episode matches the filters.")


def test_click_on_a_chart_sets_the_filter(opened: Any, address: str) -> None:
    page = listed(opened(address))
    page.locator(".bars button", has_text="right").click()
    count = page.request.get(f"{address}api/episodes?outcome=right").json()["total"]
    wait_for_count(page, count)
    page.reload()
    wait_for_count(listed(page), count)
    picture = page.locator(".charts svg").first
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] - 12, "y": 40})
    wait_until(page, "location.hash.includes('step_from=6&step_to=6')")


def test_only_visible_rows_are_rendered(opened: Any, tmp_path: Path) -> None:
    run = write_light_run(tmp_path / "many", 5000, SMALL, per_file=5000)
    session = ViewerSession(run, tmp_path / "index.sqlite")
    session.follower.catch_up()
    with open_page(opened, session) as page:
        listed(page)
        wait_for_count(page, 5000)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
        first = "document.querySelector('.rows a')?.closest('li').getAttribute('aria-posinset')"
        wait_until(page, f"{first} > 2000 && {first} < 3000")
        wait_until(page, "document.querySelectorAll('.rows a').length > 20")
        assert page.locator(".rows li").count() < 80
        assert 1 <= sum("/api/episodes" in url for url in requests) <= 4
        page.keyboard.press("End")
        wait_until(page, "document.activeElement.closest('li')?.getAttribute('aria-posinset') === '5000'")


def test_log_text_is_escaped(opened: Any, tmp_path: Path) -> None:
    run = write_light_run(tmp_path / "bad", 1, SMALL)
    log = run / "episodes" / "000000.jsonl"
    evil = "<img src=x onerror=document.title=1><script>document.title=2</script>"
    log.write_text(log.read_text().replace("Which symbol", evil).replace("<think>look", evil))
    session = ViewerSession(run, tmp_path / "index.sqlite")
    session.follower.catch_up()
    with open_page(opened, session) as page:
        listed(page)
        assert evil in page.locator(".rows .question").text_content()
        page.locator(".rows a").click()
        page.wait_for_selector(".turn")
        assert evil in page.locator(".question-turn .turn-text").text_content()
        assert page.locator("img[src=x], main script").count() == 0
        page.wait_for_selector(".player .error:visible")
    assert all("404" in text for text in opened.console_messages)  # the missing video
    opened.console_messages.clear()


# -- live ---------------------------------------------------------------------------


def test_new_lines_appear_without_scrolling(opened: Any, tmp_path: Path) -> None:
    run = write_light_run(tmp_path / "live", 200, SMALL)
    session = ViewerSession(run, tmp_path / "index.sqlite")
    session.follower.catch_up()
    with open_page(opened, session) as page:
        listed(page)
        wait_for_count(page, 200)
        page.keyboard.press("j")
        for _ in range(40):
            page.keyboard.press("j")
        chosen = page.evaluate("document.activeElement.getAttribute('href')")
        line = light_line(200, SMALL)
        with (run / "episodes" / "000001.jsonl").open("a") as file:
            file.write(line + light_line(201, SMALL) + line[:50])
        wait_for_count(page, 202)
        assert "202 episodes, following" in page.locator("#live-status").text_content()
        wait_until(page, f"document.activeElement.getAttribute('href') === '{chosen}'")
        box = page.locator(f".rows a[href='{chosen}']").bounding_box()
        assert 0 < box["y"] < DESKTOP["height"]
        with (run / "episodes" / "000001.jsonl").open("a") as file:
            file.write("\n")
        page.get_by_role("button", name="1 line skipped").click()
        page.wait_for_selector("text=episodes/000001.jsonl, line 3")
        screenshot(page, "skipped")


def test_new_run_shows_its_first_episode(opened: Any, tmp_path: Path) -> None:
    run = tmp_path / "young"
    (run / "episodes").mkdir(parents=True)
    with open_page(opened, ViewerSession(run, tmp_path / "index.sqlite")) as page:
        page.wait_for_selector("text=No episodes yet.")
        (run / "episodes" / "000000.jsonl").write_text(light_line(0, SMALL))
        wait_for_count(listed(page), 1)


def test_stopped_server_is_reported(opened: Any, made_run: Path, tmp_path: Path) -> None:
    with served(ViewerSession(made_run, tmp_path / "index.sqlite")) as url:
        page = listed(opened(url))
    page.wait_for_selector("#live-status.disconnected")
    assert "is `vz-ray view` still running?" in page.locator("#live-status").text_content()
    assert all("ERR_CONNECTION_REFUSED" in text for text in opened.console_messages)
    opened.console_messages.clear()


# -- one episode --------------------------------------------------------------------


def test_click_on_a_frame_seeks_the_player(opened: Any, address: str) -> None:
    page = opened(address)
    page.goto(first_with(page, 2, address))
    page.wait_for_selector(".frame-strip img")
    wait_until(page, "document.querySelector('video').readyState >= 2")
    frame = page.locator(".question-turn .frame-strip button").nth(5)
    frame.click()
    times = page.request.get(address + "api/episode/" + page.url.rpartition("/")[2]).json()["overview"]["times"]
    wait_until(page, f"Math.abs(document.querySelector('video').currentTime - {times[5]}) < 1e-3")
    wait_until(page, "!document.querySelector('video').seeking")
    assert page.locator(".question-turn .frame-strip li.current").count() == 1
    assert page.locator(".tl-playhead").is_visible()
    bar = page.locator(".player-column .tl-zoom").last
    start = re.search(r"Turn \d: (\d+):([\d.]+) to", bar.get_attribute("aria-label"))
    assert start is not None
    bar.click()
    seconds = 60 * int(start[1]) + float(start[2])
    wait_until(page, f"Math.abs(document.querySelector('video').currentTime - {seconds}) < 0.051")
    screenshot(page, "episode-light")


def test_episode_shows_turns_reward_and_mismatch(opened: Any, address: str) -> None:
    page = opened(address)
    page.goto(first_with(page, 1, address))
    page.wait_for_selector(".turn .token")
    text = page.locator("article.episode").inner_text()
    for expected in (
        "Overview, 16 frames",
        "Zoom 0:",
        "at 4 fps",
        "Advantage",
        "weights v",
        "rollout-",
        "episodes/0",
    ):
        assert expected in text
    page.get_by_text("Engine against learner").click()
    assert "Aggregated over step" in page.locator("details").inner_text()
    assert "3.2e-6" in page.locator("details").inner_text()
    assert page.locator(".player-column .tl-zoom:not([data-state='refused'])").count() == 1
    refused = page.locator(".player-column .tl-zoom[data-state='refused']")
    assert refused.count() == page.locator(".turn .refused").count() == 1
    assert re.search(r"Turn \d: .* fps, refused: ", refused.get_attribute("title"))
    assert page.locator(".player-column .tl-event").count() >= 1
    assert page.locator(".player-column .tl-tick").count() == 16


def test_tokens_are_shaded_by_logprob_or_advantage(opened: Any, address: str) -> None:
    page = opened(address)
    page.goto(first_with(page, 1, address))
    page.wait_for_selector(".token")
    shades = "[...document.querySelectorAll('.token')].map(e => e.style.background)"
    by_logprob = page.evaluate(shades)
    assert len(set(by_logprob)) > 5
    page.get_by_role("radio", name="Advantage").check()
    by_advantage = page.evaluate(shades)
    assert len(set(by_advantage)) == 1
    assert "s3" in by_advantage[0] or "wrong" in by_advantage[0]
    page.get_by_role("radio", name="None").check()
    assert set(page.evaluate(shades)) == {""}


def test_missing_video_is_reported_for_player_and_frames(opened: Any, run: Path, tmp_path: Path) -> None:
    for log in run.glob("*/*.jsonl"):
        log.write_text(re.sub(r'"[^"]*/needle-(\d)\.mp4"', r'"/gone/needle-\1.mp4"', log.read_text()))
    with open_page(opened, ViewerSession(run, tmp_path / "index.sqlite")) as page:
        listed(page)
        page.locator(".rows a").first.click()
        page.wait_for_selector(".player .error:visible")
        assert "no such file; check the path" in page.locator(".player .error").text_content()
        page.wait_for_selector(".frame-strip-error")
        assert "no such file; check the path" in page.locator(".frame-strip-error").first.text_content()
        assert page.locator(".frame-strip img").count() == 0
        screenshot(page, "gone")
    assert all("404" in text for text in opened.console_messages)
    opened.console_messages.clear()


# -- group --------------------------------------------------------------------------


def test_group_timeline_opens_samples(opened: Any, address: str) -> None:
    page = opened(address)
    page.goto(first_with(page, 2, address))
    page.get_by_role("link", name="Group of 4").click()
    page.wait_for_selector(".samples .sample")
    assert page.locator(".samples .sample").count() == 4
    assert page.locator(".sample.current").count() == 1
    edges = page.evaluate("[...document.querySelectorAll('.tl-track')].map(e => e.getBoundingClientRect().left)")
    assert len(set(edges)) == 1
    page.locator(".sample.current .tl-zoom").first.click()
    page.wait_for_selector("article.episode")
    start = float(page.url.rpartition("t=")[2])
    wait_until(page, f"Math.abs(document.querySelector('video').currentTime - {start}) < 1e-3")


# -- keys, sizes, schemes -----------------------------------------------------------


def test_page_works_with_the_keyboard(opened: Any, address: str) -> None:
    page = listed(opened(address))
    wait_for_count(page, 54)
    press = page.keyboard.press
    press("j")
    press("ArrowDown")
    assert page.evaluate(FOCUSED) == "2"
    press("k")
    assert page.evaluate(FOCUSED) == "1"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press("j")
    href = page.evaluate("document.activeElement.getAttribute('href')")
    press("Enter")
    page.wait_for_selector("article.episode")
    assert page.url.endswith(href)
    press("j")
    first = href.split("/")[-1].split("?")[0]
    page.wait_for_selector(f"article.episode:not([data-id='{first}'])")
    press("s")
    assert page.get_by_role("radio", name="Advantage").is_checked()
    press("g")
    page.wait_for_selector("article.group")
    press("j")
    assert page.evaluate("document.activeElement.closest('.sample') !== null")
    press("Escape")
    page.wait_for_selector(".rows a:visible")
    assert page.evaluate(FOCUSED) == "2"
    press("/")
    page.keyboard.type("how many")
    wait_until(page, "location.hash.includes('text=how+many')")
    press("Escape")
    wait_for_count(page, 54)
    press("?")
    assert page.get_by_role("dialog").is_visible()
    press("Escape")
    assert page.get_by_role("dialog").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_pages_fit_and_are_accessible(opened: Any, address: str, size: dict[str, int], scheme: str) -> None:
    page = listed(opened(address, size, scheme))
    wait_for_count(page, 54)
    name = f"{'phone' if size is PHONE else 'desk'}-{scheme}"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    if size is PHONE:
        page.get_by_role("button", name="Filters").click()
        screenshot(page, f"filters-{name}")
        assert fits_width(page)
        assert accessibility_violations(page) == []
        page.get_by_role("button", name="Filters").click()
    screenshot(page, f"list-{name}")
    assert fits_width(page)
    assert accessibility_violations(page) == []
    page.goto(first_with(page, 2, address))
    page.wait_for_selector(".frame-strip img")
    wait_until(page, "document.querySelector('video').readyState >= 2")
    screenshot(page, f"episode-{name}")
    assert fits_width(page)
    assert accessibility_violations(page) == []
    page.get_by_role("radio", name="Advantage").check()
    assert accessibility_violations(page) == []
    page.get_by_role("link", name="Group of 4").click()
    page.wait_for_selector(".sample")
    screenshot(page, f"group-{name}")
    assert fits_width(page)
    assert accessibility_violations(page) == []
    page.keyboard.press("?")
    assert accessibility_violations(page) == []


def test_copied_run_works(opened: Any, made_run: Path, tmp_path: Path) -> None:
    """The copy has no metrics, summary or configuration."""
    run = tmp_path / "bare"
    shutil.copytree(made_run / "episodes", run / "episodes")
    with open_page(opened, ViewerSession(run, tmp_path / "index.sqlite")) as page:
        listed(page)
        wait_for_count(page, 48)
        page.locator(".rows a").first.click()
        page.wait_for_selector(".frame-strip img")
        assert "tokenizer of this run is not available" in page.locator(".turn").nth(1).inner_text()
        assert page.locator("details").count() == 0
