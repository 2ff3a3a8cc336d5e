"""The agent for people and programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config
from vz_ray.utils.errors import UserError


@app.command(rich_help_panel="Serving")
def serve(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Answers questions about videos: a page for people, an OpenAI-compatible endpoint for programs.

    Example: vz-ray serve conf/serve/tiny.yaml model=runs/quickstart/models/rl

    Example: vz-ray serve conf/serve/7b.yaml model=checkpoints/agent host=0.0.0.0 access.keys_file=keys.json
    """
    from vz_ray.config.serve import ServeConfig
    from vz_ray.serve.launch import run_serve

    run_serve(resolve_config(ServeConfig, arguments, None, dry_run))


@app.command(rich_help_panel="Serving")
def roll(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint directory of the new weights.", show_default=False)
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Go back to the weights before.")] = False,
    at: Annotated[Path, typer.Option(help="Logs of the running server.")] = Path("runs/serve"),
) -> None:
    """Gives a running server other weights without dropping a request, or those that it had before.

    Example: vz-ray roll runs/quickstart/models/rl

    Example: vz-ray roll --back
    """
    from vz_ray.serve.launch import run_roll

    if (model is None) != back:
        raise UserError("give either the checkpoint of the new weights or --back")
    run_roll(model, at)


@app.command(rich_help_panel="Serving")
def ask(
    given: Annotated[
        list[str],
        typer.Argument(metavar="[VIDEO]... QUESTION", help="Files or URLs, then the question."),
    ],
    config: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="A config file or KEY=VALUE, for an engine started here."),
    ] = None,
    server: Annotated[str, typer.Option(help="Address of a server that runs.")] = "",
    key_env: Annotated[str, typer.Option(help="Environment variable with the server's key.")] = "",
) -> None:
    """Asks one question in the terminal, and shows every zoom as it happens.

    Example: vz-ray ask talk.mp4 "What is on the second slide?" --server http://127.0.0.1:8000

    Example: vz-ray ask talk.mp4 "Who speaks?" -s conf/serve/tiny.yaml -s model=runs/quickstart/models/rl
    """
    from vz_ray.config.serve import ServeConfig
    from vz_ray.serve.ask import run_ask

    resolved = resolve_config(ServeConfig, config, None, False)
    *videos, question = given
    run_ask(resolved, videos, question, server=server, key_env=key_env)


keys = typer.Typer(help="Keys that open a served agent; the server keeps their hashes alone.")
app.add_typer(keys, name="keys", no_args_is_help=True, rich_help_panel="Serving")

KeysFile = Annotated[Path, typer.Option(help="Where hashes of keys are kept, for access.keys_file.")]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    file: KeysFile = Path("keys.json"),
    days: Annotated[
        float | None, typer.Option(help="Days until it expires; none never does.", min=0, show_default=False)
    ] = None,
) -> None:
    """Makes a key and prints it, this once.

    Example: vz-ray keys create alice --days 90
    """
    from vz_ray.serve.api_keys import add_key, generate_key

    try:
        secret, key = generate_key(name, days)
    except ValueError as error:
        raise UserError(str(error)) from error
    add_key(file, key)
    print(secret)
    print(f"its hash is in {file}; the key itself is shown only now", file=sys.stderr)


@keys.command("list")
def list_keys(
    file: KeysFile = Path("keys.json"),
    hashes: Annotated[
        bool, typer.Option("--hashes", help="Print them as the environment variable takes them.")
    ] = False,
) -> None:
    """Prints names of keys and when they were made and expire; never a key.

    Example: vz-ray keys list --hashes
    """
    from vz_ray.serve.api_keys import format_key, format_key_env, load_keys

    for key in load_keys(file):
        print(format_key_env(key) if hashes else format_key(key))


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="As `vz-ray keys list` prints it.")],
    file: KeysFile = Path("keys.json"),
) -> None:
    """Takes a key away; running servers notice with the next request, and its browser sessions end.

    Example: vz-ray keys revoke alice
    """
    from vz_ray.serve.api_keys import revoke_key

    revoke_key(file, name)
    print(f"{name} is revoked")
