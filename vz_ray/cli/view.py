"""`vz-ray view`: episode viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


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
