"""Commands that show the results of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app
from vz_ray.utils.console import make_console


@app.command(rich_help_panel="Inspecting runs")
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html and summary.json from the outputs of a run.

    Example: vz-ray report runs/quickstart
    """
    import yaml

    from vz_ray.eval.run_summary import write_summary
    from vz_ray.eval.summary_tables import print_summary
    from vz_ray.monitoring.run_dir import RunDir
    from vz_ray.report import write_report

    run_dir = RunDir.open(run)
    print_summary(write_summary(run_dir.path))
    clips = (yaml.safe_load(run_dir.config.read_text()) or {}).get("clips", {})
    print(write_report(run_dir.path, decoder=clips.get("decoder", "pyav")))


@app.command(rich_help_panel="Inspecting runs")
def view(
    run: Annotated[Path, typer.Argument(help="A run directory; the run may be in progress.")],
    host: Annotated[str, typer.Option(help="Address to listen on; loopback requires no key.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="0 chooses a free port; default: 8765, or a free port.",
            show_default=False,
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Show a run's episodes in the browser, including new ones. Ctrl-C stops the server.

    Example: vz-ray view runs/quickstart

    Example: vz-ray view runs/quickstart --port 0 --open
    """
    from vz_ray.report.viewer import serve_viewer

    serve_viewer(run, host=host, port=port, open_page=open_page)


@app.command(rich_help_panel="Inspecting runs")
def top(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    once: Annotated[bool, typer.Option("--once", help="Print one screen and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as a JSON object.")] = False,
) -> None:
    """Show the live status of a training run: progress, curves, workers, decoders, warnings.

    Example: vz-ray top runs/agent
    """
    from vz_ray.monitoring.run_view import read_run_view

    run_view = read_run_view(run)
    if as_json:
        import json

        print(json.dumps(run_view.to_dict()))
        return
    from vz_ray.monitoring.top import show_top

    console = make_console()
    try:
        show_top(run_view, console.is_terminal and not once, console)
    except KeyboardInterrupt:
        return


@app.command(rich_help_panel="Inspecting runs")
def compare(runs: Annotated[list[Path], typer.Argument(help="Run directories.")]) -> None:
    """Print the scores of several runs in one table, with medians.

    Example: vz-ray compare runs/seed0 runs/seed1 runs/seed2
    """
    from vz_ray.eval.run_summary import write_summary
    from vz_ray.eval.summary_tables import SUMMARY_WIDTH, runs_table
    from vz_ray.monitoring.run_dir import RunDir

    summaries = {path.name: write_summary(RunDir.open(path).path) for path in runs}
    make_console(min_width=SUMMARY_WIDTH).print(runs_table(summaries))


@app.command(rich_help_panel="Inspecting runs")
def replay(
    directory: Annotated[Path, typer.Argument(help="A batch in the run's replay/ directory.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the weights; default: the weights saved with the batch.", show_default=False),
    ] = None,
) -> None:
    """Repeat an update that was skipped because of a non-finite loss or gradient.

    Runs in one process, on its GPU or CPU, and writes nothing. The videos must exist at their original paths.

    Example: vz-ray replay runs/agent/replay/step-000012
    """
    from vz_ray.learner.frame_cache import CachedFrameLoader
    from vz_ray.learner.replay import SkippedBatch, describe_replay, replay_update
    from vz_ray.video.local_source import LocalFrameSource

    batch = SkippedBatch.load(directory)
    with LocalFrameSource() as frames:
        loader = CachedFrameLoader(frames, batch.config.frame_cache_bytes, batch.config.timeout_s)
        for line in describe_replay(*replay_update(batch, loader, model)):
            print(line)
