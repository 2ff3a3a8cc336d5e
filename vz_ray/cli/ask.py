"""`vz-ray ask`: ask one question."""

from __future__ import annotations

from typing import Annotated

import typer

from vz_ray.cli.app import app, resolve_config


@app.command(rich_help_panel="Serving")
def ask(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="[VIDEO]... QUESTION", help="Video files or URLs, then the question."),
    ],
    config: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="A config file or KEY=VALUE for a local engine."),
    ] = None,
    server: Annotated[str, typer.Option(help="Address of a running server; default: a local engine.")] = "",
    key_env: Annotated[str, typer.Option(help="Environment variable with the server's API key.")] = "",
) -> None:
    """Ask one question in the terminal and print every zoom.

    Example: vz-ray ask talk.mp4 "What is on the second slide?" --server http://127.0.0.1:8000

    Example: vz-ray ask talk.mp4 "Who speaks?" -s conf/serve/tiny.yaml -s model=runs/quickstart/models/rl
    """
    from vz_ray.config.serve import ServeConfig
    from vz_ray.serve.ask import run_ask

    *videos, question = inputs
    run_ask(resolve_config(ServeConfig, config, None, False), videos, question, server=server, key_env=key_env)
