"""`vz-ray eval`: evaluate on benchmarks."""

from __future__ import annotations

from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config


@app.command("eval", rich_help_panel="Evaluation")
def evaluate(
    arguments: ConfigArguments = None,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Evaluate the modes of `curve`: uniform frames and agent settings."),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Evaluate a checkpoint on public benchmarks, and compare its official scores with the paper's.

    Ctrl-C stops it; the same command resumes it.

    Example: vz-ray eval conf/eval/mlvu.yaml model=checkpoints/agent data=datasets/mlvu

    Example: vz-ray eval conf/eval/needle.yaml model=runs/quickstart/models/rl name=curve --curve
    """
    from vz_ray.config.eval_run import EvalRunConfig
    from vz_ray.eval.run import run_evaluation

    config = resolve_config(EvalRunConfig, arguments, None, dry_run and not curve)
    if curve:
        modes = f"modes=[{','.join(config.curve.modes)}]"
        config = resolve_config(EvalRunConfig, [*(arguments or []), modes], None, dry_run)
    run_evaluation(config)
