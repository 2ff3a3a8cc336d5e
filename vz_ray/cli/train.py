"""`vz-ray train`: RL training."""

from __future__ import annotations

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config


@app.command(rich_help_panel="Training")
def train(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Train a policy with GRPO on zooming episodes. The same command resumes an interrupted run.

    Example: vz-ray train conf/laptop.yaml model=runs/quickstart/models/cold_start name=longer
    """
    from vz_ray.config.run import GrpoRunConfig
    from vz_ray.training.run import run_training

    run_training(resolve_config(GrpoRunConfig, arguments, None, dry_run))
