"""Commands that make data, train, export and plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config
from vz_ray.utils.console import make_console
from vz_ray.utils.errors import UserError


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


@app.command(rich_help_panel="Training")
def base(
    out: Annotated[Path, typer.Option(help="Output directory; it must not exist.")],
    family: Annotated[str, typer.Option(help="qwen2_5_vl, qwen3_vl, qwen3_vl_moe or qwen3_5.")] = "qwen2_5_vl",
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0 uses the family's default.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights and training data.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train the tiny base model: it names objects and answers questions, and cannot zoom yet.

    Qwen2.5-VL and Qwen3-VL-MoE start from random weights, the other families from the text weights of assets/tiny-base.

    Example: vz-ray base --out assets/tiny-base

    Example: vz-ray base --family qwen3_vl --out assets/tiny-qwen3_vl
    """
    from vz_ray.needle.base_training import BaseTrainingConfig, build_base_model

    training = BaseTrainingConfig.for_family(family, steps=steps, seed=seed)
    build_base_model(out, training, threads=threads)


@app.command(rich_help_panel="Training")
def train(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Train a policy with GRPO on zooming episodes. The same command resumes an interrupted run.

    Example: vz-ray train conf/laptop.yaml model=runs/quickstart/models/cold_start name=longer
    """
    from vz_ray.config.run import GrpoRunConfig
    from vz_ray.training.run import run_training

    run_training(resolve_config(GrpoRunConfig, arguments, None, dry_run))


@app.command(rich_help_panel="Training")
def sft(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Fine-tune a checkpoint on trajectories: the cold start. The same command resumes an interrupted run.

    Example: vz-ray sft conf/videozoomer-7b-sft.yaml model=MODEL data=dataset/sft.json
    """
    from vz_ray.config.sft import SftRunConfig
    from vz_ray.training.sft import run_sft

    run_sft(resolve_config(SftRunConfig, arguments, None, dry_run))


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


@app.command(rich_help_panel="Training")
def quickstart(
    arguments: ConfigArguments = None,
    name: Annotated[str, typer.Option(help="Name of the run directory; default: that of the config file.")] = "",
    dry_run: DryRun = False,
) -> None:
    """Run every stage on a laptop: videos, cold start, RL training, baselines, report.

    Ctrl-C stops it; the same command resumes it.

    Example: vz-ray quickstart --name seed1 seed=1

    Example: vz-ray quickstart family=qwen3_vl
    """
    from vz_ray.config.quickstart import QuickstartConfig, quickstart_file
    from vz_ray.needle.quickstart import run_quickstart

    arguments = [*(arguments or []), *([f"name={name}"] if name else [])]
    run_quickstart(resolve_config(QuickstartConfig, arguments, quickstart_file(arguments), dry_run))


@app.command(rich_help_panel="Training")
def baseline(run: Annotated[Path, typer.Argument(help="A finished quickstart run.")]) -> None:
    """Train the uniform baseline on as many samples as the run's agent, and evaluate it.

    Example: vz-ray baseline runs/quickstart
    """
    from vz_ray.needle.quickstart import run_baseline

    run_baseline(run)


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


@app.command(rich_help_panel="Training")
def plan(
    arguments: ConfigArguments = None,
    gpu: Annotated[str, typer.Option(help="GPU, such as H100; default: the measured one, else H100.")] = "",
    gpu_memory: Annotated[str, typer.Option(help="Memory per GPU: 80GiB, 24GB; default: that of the GPU.")] = "",
    peak_tflops: Annotated[float, typer.Option(help="Dense bfloat16 peak per GPU; 0: that of the GPU.", min=0)] = 0.0,
    mfu: Annotated[
        float, typer.Option(help="Model FLOPs utilization of the learner; 0: measured, else 0.35.", min=0, max=1)
    ] = 0.0,
    zooms: Annotated[int, typer.Option(help="Assumed zooms per episode.", min=0)] = 2,
    turn_tokens: Annotated[int, typer.Option(help="Assumed generated tokens per turn.", min=1)] = 170,
    gpu_check: Annotated[
        Path | None, typer.Option(help="Figures of `vz-ray doctor --gpu`; default: gpu-check.json of `runs`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
) -> None:
    """Estimate GPU memory, FLOPs, step time and timeouts of a `train` or `sft` run, and recommend a split of the GPUs.

    Requires no GPU and no weights. If something does not fit, the exit code is 1 and the output names a fix.

    Example: vz-ray plan conf/videozoomer-7b-rl.yaml model=Qwen2.5-VL-7B --gpu A100-80GB

    Example: vz-ray plan conf/videozoomer-7b-sft.yaml model=Qwen2.5-VL-7B learner.world_size=2 --gpu-memory 24GB

    Example: vz-ray plan conf/videozoomer-7b-rl.yaml model=/models/cold-start --json
    """
    from dataclasses import replace

    from vz_ray.config.load import split_arguments
    from vz_ray.planning.assumptions import load_assumptions
    from vz_ray.planning.gpu_figures import GPU_CHECK_FILE
    from vz_ray.planning.plan_report import make_report, plan_to_json, render_plan
    from vz_ray.planning.planner import load_plannable_config

    file, overrides = split_arguments(arguments or [])
    if file is None:
        raise UserError("got 0 config files; give one, for example conf/videozoomer-7b-rl.yaml")
    config = load_plannable_config(file, overrides)
    if gpu_check is not None and not gpu_check.is_file():
        raise UserError(f"--gpu-check is {gpu_check}, which is not a file; `vz-ray doctor --gpu` writes it")
    assumptions, warnings = load_assumptions(
        gpu_check or Path(config.runs) / GPU_CHECK_FILE,
        gpu=gpu,
        gpu_memory=gpu_memory,
        peak_tflops=peak_tflops,
        mfu=mfu,
    )
    report = make_report(config, replace(assumptions, zooms=zooms, turn_tokens=turn_tokens), warnings)
    if as_json:
        import json

        print(json.dumps(plan_to_json(report), indent=2))
    else:
        make_console(min_width=120).print(render_plan(report))
    raise typer.Exit(0 if report.plan.fits else 1)


distill = typer.Typer(
    help="Make training trajectories with a teacher model behind an OpenAI-compatible endpoint.\n\n"
    "Example: vz-ray distill exemplar conf/distill/exemplar.yaml tasks=data/train.json"
)
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
    r"""Let the teacher correct wrong episodes of the policy; corrected episodes become a data set.

    Example: vz-ray distill reflect conf/distill/reflect.yaml 'episodes=\[runs/rl/episodes]'
    """
    from vz_ray.config.distill import ReflectionRunConfig
    from vz_ray.distill.run import run_reflection_distillation

    run_reflection_distillation(resolve_config(ReflectionRunConfig, arguments, None, dry_run))
