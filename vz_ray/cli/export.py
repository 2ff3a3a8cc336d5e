"""`vz-ray export`: export a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="Training")
def export(
    source: Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint), or a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Output directory; it must not exist.")],
    base: Annotated[
        Path | None, typer.Option(help="Initial model of the training, if it has moved.", show_default=False)
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint with the highest metric.")] = False,
) -> None:
    """Export a checkpoint as a Hugging Face directory, for transformers and vLLM. Requires no GPU.

    Example: vz-ray export runs/videozoomer-7b-rl models/agent --best
    """
    from vz_ray.training.export import run_export

    print(f"exported {run_export(source, out, base, best=best)} to {out}")
