"""`vz-ray synth`: make the needle videos."""

from __future__ import annotations

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config


@app.command(rich_help_panel="Training")
def synth(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Make the synthetic needle data set: videos, task files, and a manifest with the ground truth.

    Example: vz-ray synth directory=data/needle train=96 test=52 seed=0
    """
    from vz_ray.config.data import SynthConfig
    from vz_ray.monitoring.progress import Progress
    from vz_ray.needle.synthesis import synthesize

    config = resolve_config(SynthConfig, arguments, None, dry_run)
    with Progress() as progress, progress.stage("synth", sum(config.videos.values())) as stage:
        files = synthesize(config, stage.advance)
    for split, path in files.items():
        print(f"{split}: {path}")
