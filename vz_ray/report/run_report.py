"""The page: reads a run, rebuilds a few episodes' frames, writes one HTML file."""

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
    for played in choose_episodes(run.episodes, config.max_episodes):
        refs = shown_frame_refs(played.trajectory, config.max_frames)
        pictures, trouble = await make_thumbnails(
            refs, frames, max_side_px=config.max_thumbnail_px, timeout_s=config.timeout_s
        )
        cards.append(
            episode_card(played, pictures, max_frames=config.max_frames, error=trouble, is_open=not cards)
        )
    if not cards:
        return ""
    legend = (
        '<p class="note key"><span><b class="tick"></b>overview frame</span>'
        '<span><b class="zoom"></b>zoom, by turn and frame rate</span>'
        '<span><b class="zoom refused"></b>one that was refused</span>'
        '<span><b class="event"></b>when what is asked about can be seen (its frames: time marked)</span></p>'
    )
    return f"<div>{legend}{_all_of_them(run_dir)}</div>" + "".join(cards)


def _all_of_them(run_dir: Path) -> str:
    command = f"vz-ray view {shlex.quote(str(run_dir))}"
    return f'<p class="note">All episodes, with their videos: <code>{escape(command)}</code></p>'


async def render_report(run_dir: Path, frames: FrameSource, config: ReportConfig | None = None) -> str:
    """The report of a run as one self-contained HTML page.

    Args:
        run_dir: The run; whatever it has not got to yet is left out.
        frames: Who decodes the frames of the episodes shown. A video that has
            gone is said so in place of its frames.
        config: What to show.

    Raises:
        UserError: No such run.
        ValueError: A file of the run is broken; names the file and the line.
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
        body = "<p>Nothing has been measured in this run yet.</p>"
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
    """Writes `report.html` into the run directory, whole or not at all; returns its path.

    Decodes in this process, with the `decoder` that the run had. Not for use inside a running
    event loop: there, await `render`. Raises what `render` raises.
    """
    with LocalFrameSource(decoder=decoder) as frames:
        page = asyncio.run(render_report(run_dir, frames, config))
    path = run_dir / "report.html"
    write_atomic(path, page.encode())
    return path
