"""`vz-ray replay`: repeat a skipped update."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


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
        loader = CachedFrameLoader(frames, batch.config.frame_cache_mib * 2**20, batch.config.timeout_s)
        for line in describe_replay(*replay_update(batch, loader, model)):
            print(line)
