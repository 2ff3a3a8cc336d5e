"""`vz-ray keys`: API keys of a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app
from vz_ray.utils.errors import UserError

keys = typer.Typer(help="API keys of a server, which stores only their hashes.")
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
