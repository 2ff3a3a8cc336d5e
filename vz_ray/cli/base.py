"""`vz-ray base`: train the tiny base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="Training")
def base(
    out: Annotated[Path, typer.Option(help="Output directory; it must not exist.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0 uses the default.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights and training data.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the tiny base model from scratch: it names objects and answers questions, and cannot zoom yet.

    Example: vz-ray base --out assets/tiny-base
    """
    from vz_ray.needle.base_training import BaseTrainingConfig, build_base_model

    training = BaseTrainingConfig(seed=seed, **({"steps": steps} if steps else {}))
    build_base_model(out, training, threads=threads)
