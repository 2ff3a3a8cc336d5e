"""Making models: needle videos, cold start, reinforcement learning, and what they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config


@app.command(rich_help_panel="Training")
def synth(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Makes the needle world: videos, task files, and a manifest with the truth.

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


@app.command(rich_help_panel="Training")
def base(
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 0,
    seed: Annotated[int, typer.Option(help="Makes weights and lessons.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Makes the tiny model's base again, from nothing: it can name and answer, and has never seen a zoom.

    Example: vz-ray base --out assets/tiny-base
    """
    from vz_ray.needle.base_training import BaseTrainingConfig, build_base_model

    training = BaseTrainingConfig(seed=seed, **({"steps": steps} if steps else {}))
    build_base_model(out, training, threads=threads)


@app.command(rich_help_panel="Training")
def train(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Trains a policy with GRPO on zooming episodes.

    Example: vz-ray train conf/tiny.yaml model=runs/quickstart/models/cold_start name=longer
    """
    from vz_ray.config.run import GrpoRunConfig
    from vz_ray.training.run import run_training

    run_training(resolve_config(GrpoRunConfig, arguments, None, dry_run))


@app.command(rich_help_panel="Training")
def sft(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Teaches a checkpoint by trajectories: the cold start.

    Example: vz-ray sft conf/videozoomer-7b-sft.yaml model=... data=dataset/sft.json
    """
    from vz_ray.config.sft import SftRunConfig
    from vz_ray.training.sft import run_sft

    run_sft(resolve_config(SftRunConfig, arguments, None, dry_run))


@app.command(rich_help_panel="Training")
def export(
    source: Annotated[Path, typer.Argument(help="A run, for its newest checkpoint, or a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    base: Annotated[
        Path | None, typer.Option(help="The model that training started from, if it has moved.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint with the highest figure.")] = False,
) -> None:
    """Writes a checkpoint as an ordinary HF directory, for transformers and vLLM; needs no GPU.

    Example: vz-ray export runs/videozoomer-7b-rl models/agent --best
    """
    from vz_ray.training.export import run_export

    print(f"{run_export(source, out, base, best=best)} was exported to {out}")


@app.command(rich_help_panel="Training")
def quickstart(
    arguments: ConfigArguments = None,
    name: Annotated[str, typer.Option(help="Directory of the run under runs/.")] = "quickstart",
    dry_run: DryRun = False,
) -> None:
    """Everything on a laptop: videos, cold start, reinforcement learning, baselines, report.

    Stop it with Ctrl-C and run it again: it goes on where it was.

    Example: vz-ray quickstart --name seed1 seed=1
    """
    from vz_ray.config.quickstart import QuickstartConfig
    from vz_ray.needle.quickstart import run_quickstart

    given = [*(arguments or []), f"name={name}"]
    run_quickstart(resolve_config(QuickstartConfig, given, "conf/quickstart.yaml", dry_run))


@app.command(rich_help_panel="Training")
def baseline(run: Annotated[Path, typer.Argument(help="A finished quickstart run.")]) -> None:
    """Trains the uniform baseline on as many samples as a run's agent saw, and evaluates it.

    Example: vz-ray baseline runs/quickstart
    """
    from vz_ray.needle.quickstart import run_baseline

    run_baseline(run)


@app.command(rich_help_panel="Training")
def ablate(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Trains the loop without one of its parts at a time, several seeds; writes the paper's ablation table.

    Stop it with Ctrl-C and run it again: it goes on where it was.

    Example: vz-ray ablate conf/ablation.yaml

    Example: vz-ray ablate conf/ablation.yaml name=one 'seeds=[0]'
    """
    from vz_ray.config.ablation import AblationConfig
    from vz_ray.needle.ablation_runner import run_ablation

    run_ablation(resolve_config(AblationConfig, arguments, "conf/ablation.yaml", dry_run))
