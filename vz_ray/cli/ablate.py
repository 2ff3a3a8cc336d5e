"""`vz-ray ablate`: ablation of the training stages."""

from __future__ import annotations

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config


@app.command(rich_help_panel="Training")
def ablate(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Train without one part at a time, over several seeds, and write the paper's ablation table.

    Ctrl-C stops it; the same command resumes it.

    Example: vz-ray ablate conf/ablation.yaml

    Example: vz-ray ablate conf/ablation.yaml name=one 'seeds=[0]'
    """
    from vz_ray.config.ablation import AblationConfig
    from vz_ray.needle.ablation_runner import run_ablation

    run_ablation(resolve_config(AblationConfig, arguments, "conf/ablation.yaml", dry_run))
