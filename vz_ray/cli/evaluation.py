"""Commands that evaluate checkpoints and reward functions."""

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
        bool,
        typer.Option("--curve", help="Evaluate the modes of `curve`: uniform frames and agent settings."),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Evaluate a checkpoint on public benchmarks, and compare its official scores with the paper's.

    Ctrl-C stops it; the same command resumes it.

    Example: vz-ray eval conf/eval/mlvu.yaml model=checkpoints/agent data=datasets/mlvu

    Example: vz-ray eval conf/eval/needle.yaml model=runs/quickstart/models/rl name=curve --curve
    """
    from vz_ray.config.eval_run import EvalRunConfig
    from vz_ray.eval.run import run_evaluation

    config = resolve_config(EvalRunConfig, arguments, None, dry_run and not curve)
    if curve:
        modes = f"modes=[{','.join(config.curve.modes)}]"
        config = resolve_config(EvalRunConfig, [*(arguments or []), modes], None, dry_run)
    run_evaluation(config)


@app.command("check-reward", rich_help_panel="Evaluation")
def check_reward(
    function: Annotated[str, typer.Argument(help="package.module:name")],
    episodes: Annotated[
        Path | None,
        typer.Option(help="Episode log (.jsonl), or a run (its newest log), to test it on, too.", show_default=False),
    ] = None,
) -> None:
    """Test a user reward function on example episodes of every kind.

    Example: vz-ray check-reward my_rewards:brevity

    Example: vz-ray check-reward my_rewards:brevity --episodes runs/quickstart
    """
    from vz_ray.eval.eval_log import find_episode_log, read_results
    from vz_ray.rewards.function_check import check_function, print_trials

    try:
        records = [] if episodes is None else read_results(find_episode_log(episodes))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{episodes} is not an episode log: {error!r}") from error
    trials = check_function(function, [(record.trajectory, record.task) for record in records])
    raise typer.Exit(0 if print_trials(function, trials) else 1)


@app.command("calibrate-gate", rich_help_panel="Evaluation")
def calibrate_gate(
    log: Annotated[Path, typer.Argument(help="Evaluation log with episode.gate.mode=measure.")],
    out: Annotated[Path, typer.Option(help="Output file for episode.gate.thresholds_file.")] = Path("gate.json"),
    frame_cost: Annotated[
        float | None,
        typer.Option(
            help="Minimum accuracy gain per extra frame; default: maximum accuracy per frame.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Choose the uncertainty above which an episode zooms.

    Example: vz-ray calibrate-gate runs/eval/eval/needle.jsonl --out gate.json
    """
    from vz_ray.eval.gate_calibration import calibrate_from_log

    for kind, calibration in calibrate_from_log(log, out, frame_cost=frame_cost).items():
        print(f"{kind}: zoom above {calibration.best.threshold:.4f}, {calibration.num_questions} questions")
        policies = {"gated": calibration.best, "always": calibration.always, "never": calibration.never}
        for name, point in policies.items():
            scores = f"accuracy {point.accuracy:.4f}, frames {point.frames:.1f}, zooming {point.zoom_rate:.1%}"
            print(f"  {name}: {scores}")
    print(out)
