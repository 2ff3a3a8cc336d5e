"""Runs, looked at: while they go on and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="Looking at runs")
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Writes report.html and summary.json of a run from what its stages left behind.

    Example: vz-ray report runs/quickstart
    """
    import yaml

    from vz_ray.eval.run_summary import write_summary
    from vz_ray.eval.summary_tables import print_summary
    from vz_ray.monitoring.run_dir import RunDir
    from vz_ray.report import write_report

    opened = RunDir.open(run)
    print_summary(write_summary(opened.path))
    clips = (yaml.safe_load(opened.config.read_text()) or {}).get("clips", {})
    print(write_report(opened.path, decoder=clips.get("decoder", "pyav")))


@app.command(rich_help_panel="Looking at runs")
def view(
    run: Annotated[Path, typer.Argument(help="A run directory, of a run that is over or goes on.")],
    host: Annotated[
        str, typer.Option(help="Address to bind to; on loopback no key is needed.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="0 takes any free one; without it, 8765 or any free one.",
            show_default=False,
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")] = False,
) -> None:
    """Shows a run's episodes in the browser, new ones as they are played; Ctrl-C ends it.

    Example: vz-ray view runs/quickstart

    Example: vz-ray view runs/quickstart --port 0 --open
    """
    from vz_ray.report.viewer import serve_viewer

    serve_viewer(run, host=host, port=port, open_page=open_page)


@app.command(rich_help_panel="Looking at runs")
def top(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    once: Annotated[bool, typer.Option("--once", help="Print one screen and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Shows what a training run is doing: progress, curves, workers, decoders, warnings.

    Reads the run directory alone, so it works from any machine that sees it.

    Example: vz-ray top runs/agent
    """
    from vz_ray.monitoring.run_view import read_run_view

    view = read_run_view(run)
    if as_json:
        import json

        print(json.dumps(view.to_dict()))
        return
    from rich.console import Console

    from vz_ray.monitoring.top import show_top as show

    console = Console(highlight=False)
    try:
        show(view, console.is_terminal and not once, console)
    except KeyboardInterrupt:
        return


@app.command(rich_help_panel="Looking at runs")
def compare(runs: Annotated[list[Path], typer.Argument(help="Run directories.")]) -> None:
    """Prints the figures of several runs side by side, with their medians.

    Example: vz-ray compare runs/seed0 runs/seed1 runs/seed2
    """
    from rich.console import Console

    from vz_ray.eval.run_summary import write_summary
    from vz_ray.eval.summary_tables import SUMMARY_WIDTH, runs_table
    from vz_ray.monitoring.run_dir import RunDir

    summaries = {path.name: write_summary(RunDir.open(path).path) for path in runs}
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, SUMMARY_WIDTH)
    console.print(runs_table(summaries))


@app.command(rich_help_panel="Looking at runs")
def replay(
    directory: Annotated[Path, typer.Argument(help="A batch under a run's replay/.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the weights; without it those that were kept with the batch."),
    ] = None,
) -> None:
    """Takes an update again that was skipped because its loss or gradient was no finite number.

    In this process alone, on its GPU or its cores; nothing is written. The videos must be where they were.

    Example: vz-ray replay runs/agent/replay/step-000012
    """
    from vz_ray.learner.frame_cache import CachedFrameLoader
    from vz_ray.learner.replay import SkippedBatch, describe_replay
    from vz_ray.learner.replay import replay_update as again
    from vz_ray.video.local_source import LocalFrameSource

    kept = SkippedBatch.load(directory)
    with LocalFrameSource() as frames:
        store = CachedFrameLoader(frames, kept.config.frame_cache_mib * 2**20, kept.config.timeout_s)
        for line in describe_replay(*again(kept, store, model)):
            print(line)
