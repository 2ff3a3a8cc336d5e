"""Benchmarks, and what scores and gates need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config
from vz_ray.utils.errors import UserError


@app.command("eval", rich_help_panel="Evaluation")
def evaluate(
    arguments: ConfigArguments = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Play uniform frames and the agent at several settings.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Plays public benchmarks and shows their official figures beside the paper's.

    Stop it with Ctrl-C and run it again: it goes on where it was.

    Example: vz-ray eval conf/eval/mlvu.yaml model=checkpoints/agent data=datasets/mlvu

    Example: vz-ray eval conf/eval/needle.yaml model=runs/quickstart/models/rl name=curve --curve
    """
    from vz_ray.config.eval_run import EvalRunConfig
    from vz_ray.eval.run import run_evaluation

    given = list(arguments or [])
    config = resolve_config(EvalRunConfig, given, None, dry_run and not curve)
    if curve:
        modes = f"modes=[{','.join(config.curve.modes)}]"
        config = resolve_config(EvalRunConfig, [*given, modes], None, dry_run)
    run_evaluation(config)


@app.command("check-reward", rich_help_panel="Evaluation")
def check_reward(
    function: Annotated[str, typer.Argument(help="package.module:name")],
    episodes: Annotated[
        Path | None,
        typer.Option(help="Episodes of a run to try it on too (.jsonl).", show_default=False),
    ] = None,
) -> None:
    """Tries a reward function of your own on episodes of every kind.

    Example: vz-ray check-reward my_rewards:brevity --episodes runs/quickstart/episodes/000003.jsonl
    """
    from vz_ray.eval.eval_log import read_results
    from vz_ray.rewards.function_check import check_function, print_trials

    try:
        records = [] if episodes is None else read_results(episodes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{episodes} is no log of episodes: {error!r}") from error
    trials = check_function(function, [(record.trajectory, record.task) for record in records])
    raise typer.Exit(0 if print_trials(function, trials) else 1)


@app.command("calibrate-gate", rich_help_panel="Evaluation")
def calibrate_gate(
    log: Annotated[Path, typer.Argument(help="Evaluation log, played with episode.gate.mode=measure.")],
    out: Annotated[Path, typer.Option(help="Thresholds, for episode.gate.thresholds_file.")] = Path(
        "gate.json"
    ),
    price: Annotated[
        float | None,
        typer.Option(
            help="Accuracy that a further frame must bring; none takes the most accuracy per frame.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Finds how uncertain an answer must be for zooming to be worth it.

    Example: vz-ray calibrate-gate runs/eval/eval/needle.jsonl --out gate.json
    """
    from vz_ray.eval.gate_calibration import calibrate_from_log

    for kind, found in calibrate_from_log(log, out, frame_cost=price).items():
        print(f"{kind}: zoom above {found.best.threshold:.4f}, {found.num_questions} questions")
        for name, one in (("gated", found.best), ("always", found.always), ("never", found.never)):
            figures = f"accuracy {one.accuracy:.4f}, frames {one.frames:.1f}, zooming {one.zoom_rate:.1%}"
            print(f"  {name}: {figures}")
    print(out)
