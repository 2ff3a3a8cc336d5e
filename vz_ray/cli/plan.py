"""What a run will take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, app
from vz_ray.utils.errors import UserError


@app.command(rich_help_panel="Training")
def plan(
    arguments: ConfigArguments = None,
    gpu_memory: Annotated[str, typer.Option(help="Memory of each GPU: 80GiB, 24GB.")] = "80GiB",
    peak_tflops: Annotated[
        float, typer.Option(help="Of each GPU in bfloat16, dense, as its maker says; 989 is an H100's.")
    ] = 989.0,
    mfu: Annotated[float, typer.Option(help="Share of that which the learner reaches; assumed.")] = 0.35,
    zooms: Annotated[int, typer.Option(help="Of a usual episode; assumed.")] = 2,
    turn_tokens: Annotated[int, typer.Option(help="Sampled in a usual turn; assumed.")] = 170,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Says what a run of `train` or `sft` will take: tokens, memory of each GPU, arithmetic, time.

    Needs no GPU and no weights. Ends with status 1 where something does not fit, and says what to change.

    Example: vz-ray plan conf/videozoomer-7b-rl.yaml model=Qwen2.5-VL-7B --gpu-memory 80GiB

    Example: vz-ray plan conf/videozoomer-7b-sft.yaml model=Qwen2.5-VL-7B learner.world_size=2 --gpu-memory 24GB

    Example: vz-ray plan conf/videozoomer-7b-rl.yaml model=/models/cold-start --json
    """
    from vz_ray.planning.advice import advise
    from vz_ray.planning.gpu_memory import parse_bytes
    from vz_ray.planning.plan_report import plan_to_json, render_plan
    from vz_ray.planning.planner import Assumptions, load_plannable_config, make_plan

    given = arguments or []
    files = [one for one in given if one.endswith((".yaml", ".yml")) and "=" not in one]
    if len(files) != 1:
        raise UserError(
            f"{len(files)} config files were given; give one, such as conf/videozoomer-7b-rl.yaml"
        )
    config = load_plannable_config(Path(files[0]), [one for one in given if one not in files])
    assumed = Assumptions(parse_bytes(gpu_memory), peak_tflops, mfu, zooms, turn_tokens)
    made = make_plan(config, assumed)
    advice = advise(config, made, assumed)
    if as_json:
        import json

        print(json.dumps(plan_to_json(made, assumed, advice), indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, 120)
        console.print(render_plan(made, assumed, advice))
    raise typer.Exit(0 if made.fits else 1)
