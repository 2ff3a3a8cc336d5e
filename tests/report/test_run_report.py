"""HTML report of a run directory with real videos."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vz_ray.config.quickstart import ReportConfig
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.report import render_report, write_report
from vz_ray.report.sections import failure_bars
from vz_ray.utils.errors import UserError
from vz_ray.video.local_source import LocalFrameSource

_VOID = {"meta", "img", "br"}


class StrictParser(HTMLParser):
    """Fails on unbalanced tags; collects tags and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> StrictParser:
    parser = StrictParser()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / run_dir.name))


def test_report_is_self_contained(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    parser = parse(page)
    assert "script" not in parser.tags
    assert all(link.startswith("data:image/") for link in parser.links)
    assert "url(" not in page
    assert "@import" not in page


def test_report_links_to_the_viewer_command(copy: Path) -> None:
    spaced = copy.rename(copy.with_name("my run"))
    page = write_report(spaced).read_text()
    assert f"All episodes with videos: <code>vz-ray view &#x27;{spaced}&#x27;</code>" in page


def test_report_has_every_section(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    for text in (
        "Accuracy on held-out questions",
        "Accuracy against frames seen",
        "Failure modes",
        "Accuracy by kind of question",
        "Reward and its parts",
        "Zooming",
        "Episodes with the event in a zoom",
        "Engine against learner",
        "Weight sync",
        "Wall time by stage",
        "Zoom rejected (reversed)",
    ):
        assert text in page
    accuracy = json.loads((run_dir / "summary.json").read_text())["accuracy"]["rl"]
    assert f"<b>{100 * accuracy:.1f}%</b>" in page


def test_failure_bars_cover_each_agent_evaluation(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    wrong = {stage: round(6 * (1 - summary["accuracy"][stage])) for stage in ("cold_start", "rl")}
    assert wrong["cold_start"] > wrong["rl"] > 0
    bars = failure_bars(summary)
    parse(bars)
    counts = re.findall(r'title="(.*?): (\d+) of 6 episodes"', bars)
    assert sum(int(count) for stage, count in counts if stage == "After cold start") == wrong["cold_start"]
    assert sum(int(count) for stage, count in counts if stage == "After RL") == wrong["rl"]
    assert "Uniform" not in bars
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bars)]
    assert max(widths) == 100
    assert bars in write_report(run_dir).read_text()


def test_failure_bars_are_empty_without_failures(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    none = {stage: dict.fromkeys(modes, 0) for stage, modes in summary["failures"].items()}
    assert failure_bars({**summary, "failures": none}) == ""
    assert failure_bars({**summary, "failures": {}}) == failure_bars({}) == ""


def test_custom_reward_parts_have_a_chart_and_card_entry(copy: Path) -> None:
    assert "Other reward parts" not in write_report(copy).read_text()
    with MetricLogger(copy / "metrics.jsonl") as log:
        log.log(40, {metric_names.REWARD_TOTAL: 0.5, "reward/judge_score": 3.5})
        log.log(41, {metric_names.REWARD_TOTAL: 0.5, "reward/judge_score": 4.0})
    path = copy / "eval" / "rl.jsonl"
    path.write_text(path.read_text().replace('"note":"","extra":{}', '"note":"","extra":{"judge_score":4.0}'))
    page = write_report(copy).read_text()
    parse(page)
    assert "Other reward parts" in page
    assert "<dt>Judge score</dt><dd>4.00</dd>" in page


def test_thumbnails_show_the_frames_of_the_episodes(run_dir: Path) -> None:
    page = write_report(run_dir, ReportConfig(max_episodes=1)).read_text()
    assert page.count('class="episode"') == 1
    num_images = page.count("<img ")
    assert num_images >= 16 + 3
    assert page.count("no-image") == 2  # only in the style sheet
    assert write_report(run_dir, ReportConfig(max_episodes=1, max_frames=4)).read_text().count("<img ") < num_images


def test_external_text_is_escaped(copy: Path) -> None:
    path = copy / "eval" / "rl.jsonl"
    path.write_text(path.read_text().replace("The border", '<script>alert(1)</script><img src=\\"http://x\\">'))
    (copy / "config.yaml").write_text("name: </pre><script>\n")
    parser = parse(write_report(copy).read_text())
    assert "script" not in parser.tags
    assert all(link.startswith("data:") for link in parser.links)


def test_missing_video_is_reported(copy: Path) -> None:
    path = copy / "eval" / "rl.jsonl"
    path.write_text(re.sub(r"[^\"]*/v(\d)\.mp4", r"/gone/v\1.mp4", path.read_text()))
    page = write_report(copy).read_text()
    assert "Frames are not available" in page
    assert "/gone/v0.mp4" in page
    assert "<img " not in page


def test_started_run_has_a_report(tmp_path: Path) -> None:
    assert "This run has no results yet" in write_report(tmp_path).read_text()
    with MetricLogger(tmp_path / "metrics.jsonl") as log:
        log.log(0, {metric_names.REWARD_TOTAL: 0.5, metric_names.MISMATCH_LOGPROB_MAX: 0.0})
    page = write_report(tmp_path).read_text()
    parse(page)
    assert "Reward and its parts" in page
    assert "Engine against learner" not in page  # zero cannot be drawn on a logarithmic axis


def test_training_episodes_are_shown_without_evaluations(copy: Path) -> None:
    lines = (copy / "eval" / "rl.jsonl").read_text().splitlines(keepends=True)
    shutil.rmtree(copy / "eval")
    (copy / "summary.json").unlink()
    (copy / "episodes").mkdir()
    (copy / "episodes" / "3.jsonl").write_text("".join(lines[1:]) + '{"half')
    assert 'class="episode"' in write_report(copy).read_text()


def test_invalid_log_line_is_named(copy: Path) -> None:
    path = copy / "eval" / "rl.jsonl"
    path.write_text(path.read_text().replace('"task":', '"tusk":', 1))
    with pytest.raises(ValueError, match=r"rl\.jsonl, line 2"):
        write_report(copy)


def test_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_render_report_works_in_an_event_loop(run_dir: Path) -> None:
    async def render() -> str:
        with LocalFrameSource() as frames:
            return await render_report(run_dir, frames, ReportConfig(max_episodes=1))

    assert "<img " in asyncio.run(render())
