"""HTML report of a run: `report.html`, one self-contained file."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path

from vz_ray.config.report import ReportConfig
from vz_ray.env.protocols import FrameSource
from vz_ray.report import sections
from vz_ray.report.episode_card import choose_episodes, episode_card, shown_frame_refs
from vz_ray.report.markup import escape, report_css
from vz_ray.report.run_data import RunData, read_run
from vz_ray.report.thumbnails import make_thumbnails
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.video.local_source import LocalFrameSource


def _section(title: str, body: str, kind: str = "charts") -> str:
    return f'<section><h2>{escape(title)}</h2><div class="{kind}">{body}</div></section>' if body else ""


async def _episodes(run_dir: Path, run: RunData, frames: FrameSource, config: ReportConfig) -> str:
    cards: list[str] = []
    for episode in choose_episodes(run.episodes, config.max_episodes):
        refs = shown_frame_refs(episode.trajectory, config.max_frames)
        thumbnails, error = await make_thumbnails(
            refs, frames, max_side_px=config.max_thumbnail_px, timeout_s=config.timeout_s
        )
        cards.append(episode_card(episode, thumbnails, max_frames=config.max_frames, error=error, is_open=not cards))
    if not cards:
        return ""
    legend = (
        '<p class="note key"><span><b class="tick"></b>overview frame</span>'
        '<span><b class="zoom"></b>zoom, by turn and frame rate</span>'
        '<span><b class="zoom refused"></b>rejected zoom</span>'
        '<span><b class="event"></b>evidence span (time of its frames highlighted)</span></p>'
    )
    return f"<div>{legend}{_viewer_hint(run_dir)}</div>" + "".join(cards)


def _viewer_hint(run_dir: Path) -> str:
    command = f"vz-ray view {shlex.quote(str(run_dir))}"
    return f'<p class="note">All episodes with videos: <code>{escape(command)}</code></p>'


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
    config = config or ReportConfig()
    run = read_run(run_dir)
    results = sections.accuracy_bars(run.summary) + sections.frames_curve(run.summary)
    results += sections.failure_bars(run.summary)
    results += sections.question_kind_table(run.summary) + sections.evaluations_table(run.summary)
    body = (
        sections.summary_tiles(run.summary)
        + _section("Results", results, "charts pair")
        + _section("Training", sections.training_charts(run.metric_rows))
        + _section("Time", sections.stage_times(run.summary))
        + _section("Episodes", await _episodes(run_dir, run, frames, config), "episodes")
    )
    if not body:
        body = "<p>This run has no results yet.</p>"
    if run.config:
        config_text = f"<summary>Configuration</summary><pre>{escape(run.config)}</pre>"
        body += f"<section><details>{config_text}</details></section>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.name)} · vz_ray</title><style>{report_css()}</style></head>"
        f"<body><main><header><h1>{escape(run.name)}</h1></header>{body}</main></body></html>\n"
    )


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
