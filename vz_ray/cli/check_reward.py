"""`vz-ray check-reward`: test a user reward function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app
from vz_ray.utils.errors import UserError


@app.command("check-reward", rich_help_panel="Evaluation")
def check_reward(
    function: Annotated[str, typer.Argument(help="package.module:name")],
    episodes: Annotated[
        Path | None,
        typer.Option(help="Episode log (.jsonl) to test it on as well.", show_default=False),
    ] = None,
) -> None:
    """Test a user reward function on example episodes of every kind.

    Example: vz-ray check-reward my_rewards:brevity --episodes runs/quickstart/episodes/000003.jsonl
    """
    from vz_ray.eval.eval_log import read_results
    from vz_ray.rewards.function_check import check_function, print_trials

    try:
        records = [] if episodes is None else read_results(episodes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{episodes} is not an episode log: {error!r}") from error
    trials = check_function(function, [(record.trajectory, record.task) for record in records])
    raise typer.Exit(0 if print_trials(function, trials) else 1)
