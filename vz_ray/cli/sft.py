"""`vz-ray sft`: supervised fine-tuning."""

from __future__ import annotations

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config


@app.command(rich_help_panel="Training")
def sft(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Fine-tune a checkpoint on trajectories: the cold start. The same command resumes an interrupted run.

    Example: vz-ray sft conf/videozoomer-7b-sft.yaml model=... data=dataset/sft.json
    """
    from vz_ray.config.sft import SftRunConfig
    from vz_ray.training.sft import run_sft

    run_sft(resolve_config(SftRunConfig, arguments, None, dry_run))
