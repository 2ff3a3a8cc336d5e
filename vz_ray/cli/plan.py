"""`vz-ray plan`: estimate the resources of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, app, split_arguments
from vz_ray.utils.errors import UserError


@app.command(rich_help_panel="Training")
def plan(
    arguments: ConfigArguments = None,
    gpu_memory: Annotated[str, typer.Option(help="Memory per GPU: 80GiB, 24GB.")] = "80GiB",
    peak_tflops: Annotated[float, typer.Option(help="Dense bfloat16 peak per GPU; 989 for an H100.")] = 989.0,
    mfu: Annotated[float, typer.Option(help="Assumed model FLOPs utilization of the learner.")] = 0.35,
    zooms: Annotated[int, typer.Option(help="Assumed zooms per episode.")] = 2,
    turn_tokens: Annotated[int, typer.Option(help="Assumed generated tokens per turn.")] = 170,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
) -> None:
    """Estimate tokens, GPU memory, FLOPs and time of a `train` or `sft` run.

    Requires no GPU and no weights. If something does not fit, the exit code is 1 and the output names a fix.

    Example: vz-ray plan conf/videozoomer-7b-rl.yaml model=Qwen2.5-VL-7B --gpu-memory 80GiB

    Example: vz-ray plan conf/videozoomer-7b-sft.yaml model=Qwen2.5-VL-7B learner.world_size=2 --gpu-memory 24GB

    Example: vz-ray plan conf/videozoomer-7b-rl.yaml model=/models/cold-start --json
    """
    from vz_ray.planning.advice import advise
    from vz_ray.planning.gpu_memory import parse_bytes
    from vz_ray.planning.plan_report import plan_to_json, render_plan
    from vz_ray.planning.planner import Assumptions, load_plannable_config, make_plan

    file, overrides = split_arguments(arguments or [])
    if file is None:
        raise UserError("got 0 config files; give one, for example conf/videozoomer-7b-rl.yaml")
    config = load_plannable_config(Path(file), overrides)
    assumptions = Assumptions(parse_bytes(gpu_memory), peak_tflops, mfu, zooms, turn_tokens)
    resource_plan = make_plan(config, assumptions)
    advice = advise(config, resource_plan, assumptions)
    if as_json:
        import json

        print(json.dumps(plan_to_json(resource_plan, assumptions, advice), indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, 120)
        console.print(render_plan(resource_plan, assumptions, advice))
    raise typer.Exit(0 if resource_plan.fits else 1)
