"""HTML report of a run: `report.html`, one self-contained file."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from vz_ray.config.quickstart import ReportConfig
from vz_ray.data.episode_record import EpisodeRecord, record_from_dict
from vz_ray.env.protocols import FrameSource
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.report import sections
from vz_ray.report.episode_card import choose_episodes, episode_card, shown_frame_refs
from vz_ray.report.markup import escape, html_page, section
from vz_ray.report.thumbnails import make_thumbnails
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import read_complete_lines
from vz_ray.video.local_source import LocalFrameSource


def _read_episodes(path: Path) -> Iterator[EpisodeRecord]:
    """Yield the episodes of a log; its header is skipped."""
    for number, line in enumerate(read_complete_lines(path), start=1):
        try:
            if "trajectory" in line:
                yield record_from_dict(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not an episode ({error!r})") from error


def _report_episodes(run_dir: Path) -> list[EpisodeRecord]:
    """Return the evaluated episodes of the agent's last stage, or else the newest training episodes."""
    logs = [run_dir / "eval" / f"{stage}.jsonl" for stage in ("rl", "sft_continued", "cold_start")]
    logs += sorted((run_dir / "episodes").glob("*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for log in logs:
        if log.exists() and (episodes := list(_read_episodes(log))):
            return episodes
    return []


async def _episodes(run_dir: Path, frames: FrameSource, config: ReportConfig) -> str:
    cards: list[str] = []
    for episode in choose_episodes(_report_episodes(run_dir), config.max_episodes):
        refs = shown_frame_refs(episode.trajectory, config.max_frames)
        thumbnails, error = await make_thumbnails(
            refs, frames, max_side_px=config.max_thumbnail_px, timeout_s=config.timeout_s
        )
        cards.append(episode_card(episode, thumbnails, max_frames=config.max_frames, error=error, is_open=not cards))
    if not cards:
        return ""
    legend = (
        '<p class="note legend-row"><span><b class="tick"></b>overview frame</span>'
        '<span><b class="zoom"></b>zoom, by turn and frame rate</span>'
        '<span><b class="zoom refused"></b>rejected zoom</span>'
        '<span><b class="event"></b>evidence span (time of its frames highlighted)</span></p>'
    )
    return f"<div>{legend}{_viewer_hint(run_dir)}</div>" + "".join(cards)


def _viewer_hint(run_dir: Path) -> str:
    command = f"vz-ray view {shlex.quote(str(run_dir))}"
    return f'<p class="note">All episodes with videos: <code>{escape(command)}</code></p>'


def _results(run_dir: Path) -> str:
    """Render the sections about the whole run."""
    if not run_dir.is_dir():
        raise UserError(f"no run directory at {run_dir}: check the name")
    file = run_dir / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    results = (
        sections.accuracy_bars(summary)
        + sections.frames_curve(summary)
        + sections.failure_bars(summary)
        + sections.question_kind_table(summary)
        + sections.evaluations_table(summary)
    )
    return (
        sections.summary_tiles(summary)
        + section("Results", results, "charts pair")
        + section("Training", sections.training_charts(read_metrics(run_dir / "metrics.jsonl")))
        + section("Time", sections.stage_times(summary))
    )


def _page(run_dir: Path, body: str) -> str:
    """Complete the page: title, configuration, and a text if there is nothing to show."""
    body = body or "<p>This run has no results yet.</p>"
    file = run_dir / "config.yaml"
    if file.exists() and (config := file.read_text()):
        body += f"<section><details><summary>Configuration</summary><pre>{escape(config)}</pre></details></section>"
    name = run_dir.resolve().name
    return html_page(f"{name} · vz_ray", name, body)


async def render_report(run_dir: Path, frames: FrameSource, config: ReportConfig | None = None) -> str:
    """Render the report of a run as one self-contained HTML page.

    Args:
        run_dir: Run directory. Missing parts are omitted.
        frames: Decodes the frames of the displayed episodes. An unavailable video is reported on the card.
        config: Number of episodes, frames and sizes.

    Raises:
        UserError: The run does not exist.
        ValueError: A file of the run is invalid. The message names the file and the line.
    """
    results = _results(run_dir)
    episodes = await _episodes(run_dir, frames, config or ReportConfig())
    return _page(run_dir, results + section("Episodes", episodes, "episodes"))


def write_report(run_dir: Path, config: ReportConfig | None = None, *, decoder: str = "pyav") -> Path:
    """Write `report.html` atomically into the run directory and return its path.

    Decodes in this process with `decoder`. Inside an event loop, await `render_report` instead.
    Raises the same errors as `render_report`.
    """
    with LocalFrameSource(decoder=decoder) as frames:
        page = asyncio.run(render_report(run_dir, frames, config))
    path = run_dir / "report.html"
    write_atomic(path, page.encode())
    return path
