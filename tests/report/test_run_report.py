"""The page as a whole, from a run directory with a real video."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vz_ray.config.report import ReportConfig
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.report import render_report, write_report
from vz_ray.report.sections import failure_bars
from vz_ray.utils.errors import UserError
from vz_ray.video.local_source import LocalFrameSource

_VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order; collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / run_dir.name))


def test_the_report_is_one_file_that_needs_no_network(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    parser = parsed(page)
    assert "script" not in parser.seen
    assert all(link.startswith("data:image/") for link in parser.links)
    assert "url(" not in page
    assert "@import" not in page


def test_it_says_how_to_see_every_episode(copy: Path) -> None:
    spaced = copy.rename(copy.with_name("my run"))
    page = write_report(spaced).read_text()
    assert f"All episodes, with their videos: <code>vz-ray view &#x27;{spaced}&#x27;</code>" in page


def test_every_part_is_there(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    for words in (
        "Accuracy on held-out questions",
        "Accuracy against frames seen",
        "What went wrong",
        "Accuracy by kind of question",
        "Reward and its parts",
        "Zooming",
        "Episodes with the event in a zoom",
        "Engine against learner",
        "Weight sync",
        "Wall time by stage",
        "Zoom refused (reversed)",
    ):
        assert words in page
    accuracy = json.loads((run_dir / "summary.json").read_text())["accuracy"]["rl"]
    assert f"<b>{100 * accuracy:.1f}%</b>" in page


def test_what_went_wrong_is_drawn_for_each_evaluation_of_the_agent(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    wrong = {stage: round(6 * (1 - summary["accuracy"][stage])) for stage in ("cold_start", "rl")}
    assert wrong["cold_start"] > wrong["rl"] > 0
    bars = failure_bars(summary)
    parsed(bars)
    shown = re.findall(r'title="(.*?): (\d+) of 6 episodes"', bars)
    assert sum(int(count) for stage, count in shown if stage == "After cold start") == wrong["cold_start"]
    assert sum(int(count) for stage, count in shown if stage == "After RL") == wrong["rl"]
    assert "Uniform" not in bars
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bars)]
    assert max(widths) == 100
    assert bars in write_report(run_dir).read_text()


def test_a_run_without_failures_has_no_such_chart(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    none = {stage: dict.fromkeys(found, 0) for stage, found in summary["failures"].items()}
    assert failure_bars({**summary, "failures": none}) == ""
    assert failure_bars({**summary, "failures": {}}) == failure_bars({}) == ""


def test_parts_of_a_runs_own_have_a_chart_and_a_place_on_the_card(copy: Path) -> None:
    assert "Further parts of the reward" not in write_report(copy).read_text()
    with MetricLogger(copy / "metrics.jsonl") as log:
        log.log(40, {metric_names.REWARD_TOTAL: 0.5, "reward/judge_score": 3.5})
        log.log(41, {metric_names.REWARD_TOTAL: 0.5, "reward/judge_score": 4.0})
    path = copy / "eval" / "rl.jsonl"
    path.write_text(path.read_text().replace('"more":{}', '"more":{"judge_score":4.0}'))
    page = write_report(copy).read_text()
    parsed(page)
    assert "Further parts of the reward" in page
    assert "<dt>Judge score</dt><dd>4.00</dd>" in page


def test_thumbnails_are_the_frames_of_the_episodes(run_dir: Path) -> None:
    page = write_report(run_dir, ReportConfig(max_episodes=1)).read_text()
    assert page.count('class="episode"') == 1
    shown = page.count("<img ")
    assert shown >= 16 + 3
    assert page.count("nopicture") == 2  # in the style sheet alone
    assert (
        write_report(run_dir, ReportConfig(max_episodes=1, max_frames=4)).read_text().count("<img ") < shown
    )


def test_text_from_outside_cannot_become_markup(copy: Path) -> None:
    path = copy / "eval" / "rl.jsonl"
    path.write_text(
        path.read_text().replace("The border", '<script>alert(1)</script><img src=\\"http://x\\">')
    )
    (copy / "config.yaml").write_text("name: </pre><script>\n")
    parser = parsed(write_report(copy).read_text())
    assert "script" not in parser.seen
    assert all(link.startswith("data:") for link in parser.links)


def test_a_video_that_has_gone_is_said_so(copy: Path) -> None:
    path = copy / "eval" / "rl.jsonl"
    path.write_text(re.sub(r"[^\"]*/v(\d)\.mp4", r"/gone/v\1.mp4", path.read_text()))
    page = write_report(copy).read_text()
    assert "Frames could not be rebuilt" in page
    assert "/gone/v0.mp4" in page
    assert "<img " not in page


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    assert "Nothing has been measured" in write_report(tmp_path).read_text()
    with MetricLogger(tmp_path / "metrics.jsonl") as log:
        log.log(0, {metric_names.REWARD_TOTAL: 0.5, metric_names.MISMATCH_LOGPROB_MAX: 0.0})
    page = write_report(tmp_path).read_text()
    parsed(page)
    assert "Reward and its parts" in page
    assert "Engine against learner" not in page  # zero has no place on a logarithmic axis


def test_training_episodes_are_shown_where_nothing_was_evaluated(copy: Path) -> None:
    lines = (copy / "eval" / "rl.jsonl").read_text().splitlines(keepends=True)
    shutil.rmtree(copy / "eval")
    (copy / "summary.json").unlink()
    (copy / "episodes").mkdir()
    (copy / "episodes" / "3.jsonl").write_text("".join(lines[1:]) + '{"half')
    assert 'class="episode"' in write_report(copy).read_text()


def test_a_broken_log_is_named(copy: Path) -> None:
    path = copy / "eval" / "rl.jsonl"
    path.write_text(path.read_text().replace('"task":', '"tusk":', 1))
    with pytest.raises(ValueError, match=r"rl\.jsonl, line 2"):
        write_report(copy)


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_it_can_be_awaited_where_a_loop_runs(run_dir: Path) -> None:
    async def inside() -> str:
        with LocalFrameSource() as frames:
            return await render_report(run_dir, frames, ReportConfig(max_episodes=1))

    assert "<img " in asyncio.run(inside())
