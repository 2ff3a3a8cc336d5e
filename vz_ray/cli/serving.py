"""Commands that serve agents, manage API keys and ask questions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config
from vz_ray.utils.errors import UserError


@app.command(rich_help_panel="Serving")
def serve(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Serve an agent that answers questions about videos: a web page and an OpenAI-compatible API.

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
    back: Annotated[bool, typer.Option("--back", help="Restore the previous weights.")] = False,
    log_dir: Annotated[Path, typer.Option(help="`log_dir` of the running server.")] = Path("runs/serve"),
) -> None:
    """Change the weights of a running server without dropping a request, or restore the previous weights.

    Example: vz-ray roll runs/quickstart/models/rl

    Example: vz-ray roll --back
    """
    from vz_ray.serve.launch import run_roll

    if (model is None) != back:
        raise UserError("got none or both of MODEL and --back; give one")
    run_roll(model, log_dir)


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


keys = typer.Typer(
    help="API keys of a server, which stores only their hashes.\n\nExample: vz-ray keys create alice --days 90"
)
app.add_typer(keys, name="keys", no_args_is_help=True, rich_help_panel="Serving")

KeysFile = Annotated[Path, typer.Option(help="File of key hashes, for access.keys_file.")]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Owner of the key.")],
    file: KeysFile = Path("keys.json"),
    days: Annotated[
        float | None, typer.Option(help="Days until it expires; default: never.", min=0, show_default=False)
    ] = None,
) -> None:
    """Create an API key and print it once.

    Example: vz-ray keys create alice --days 90
    """
    from vz_ray.serve.api_keys import add_key, generate_key

    try:
        secret, key = generate_key(name, days)
    except ValueError as error:
        raise UserError(str(error)) from error
    add_key(file, key)
    print(secret)
    print(f"stored its hash in {file}; the key is not shown again", file=sys.stderr)


@keys.command("list")
def list_keys(
    file: KeysFile = Path("keys.json"),
    hashes: Annotated[
        bool, typer.Option("--hashes", help="Print hashes in the format of the environment variable.")
    ] = False,
) -> None:
    """Print names, creation and expiry dates of the keys.

    Example: vz-ray keys list --hashes
    """
    from vz_ray.serve.api_keys import format_key, format_key_env, load_keys

    for key in load_keys(file):
        print(format_key_env(key) if hashes else format_key(key))


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="Name from `vz-ray keys list`.")],
    file: KeysFile = Path("keys.json"),
) -> None:
    """Revoke a key. Running servers refuse it from the next request on and end its browser sessions.

    Example: vz-ray keys revoke alice
    """
    from vz_ray.serve.api_keys import revoke_key

    revoke_key(file, name)
    print(f"revoked {name}")
