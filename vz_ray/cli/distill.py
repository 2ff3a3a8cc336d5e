"""`vz-ray distill`: training data from a teacher."""

from __future__ import annotations

import typer

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config

distill = typer.Typer(help="Make training trajectories with a teacher model behind an OpenAI-compatible endpoint.")
app.add_typer(distill, name="distill", no_args_is_help=True, rich_help_panel="Training")


@distill.command()
def exemplar(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Let the teacher solve tasks; its correct episodes become a data set.

    Ctrl-C stops it. The same command resumes it and repeats no finished episode and no paid request.

    Example: vz-ray distill exemplar conf/distill/exemplar.yaml tasks=data/train.json teacher.max_cost_usd=50
    """
    from vz_ray.config.distill import ExemplarRunConfig
    from vz_ray.distill.run import run_exemplar_distillation

    run_exemplar_distillation(resolve_config(ExemplarRunConfig, arguments, None, dry_run))


@distill.command()
def reflect(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Let the teacher correct wrong episodes of the policy; corrected episodes become a data set.

    Example: vz-ray distill reflect conf/distill/reflect.yaml episodes=[runs/rl/episodes]
    """
    from vz_ray.config.distill import ReflectionRunConfig
    from vz_ray.distill.run import run_reflection_distillation

    run_reflection_distillation(resolve_config(ReflectionRunConfig, arguments, None, dry_run))
