"""`python -m cluster.manifests check | render | rules`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from cluster.manifests import kustomize, schema
from cluster.manifests.check import check_folders
from cluster.manifests.dockerfile import check_dockerfiles
from cluster.manifests.rules import RULES
from vz_ray.utils.errors import UserError

app = typer.Typer(
    help="Renders and checks the manifests in k8s/.", no_args_is_help=True, pretty_exceptions_enable=False
)
BASE = schema.ROOT / "k8s" / "base"
OVERLAYS = schema.ROOT / "k8s" / "overlays"


@app.command()
def check(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Overlays; all of k8s/overlays, and the Dockerfiles, without any."),
    ] = None,
) -> None:
    """Holds overlays to schemas and rules; status 1 if there is anything to mend."""
    if schema.schemas_folder() is None:
        print(
            "KubeRay's schemas are not at hand (VZ_RAY_CRDS): its objects are held to rules alone",
            file=sys.stderr,
        )
    wrong = [] if folders else [("cluster/docker", fault) for fault in check_dockerfiles()]
    given = folders or sorted(path.parent for path in OVERLAYS.glob("*/kustomization.yaml"))
    for folder in given:
        # A part of the base is applied beside what all share.
        shared = [BASE / "common"] if folder.resolve().parent == BASE and folder.name != "common" else []
        wrong += [(str(folder), str(finding)) for finding in check_folders([*shared, folder])]
    for where, finding in wrong:
        print(f"{where}: {finding}")
    known = f"{len(given)} folders, {len(RULES)} rules"
    print(f"{len(wrong)} findings in {known}" if wrong else f"nothing to mend in {known}")
    raise typer.Exit(1 if wrong else 0)


@app.command()
def render(
    folder: Annotated[Path, typer.Argument(help="A folder with a kustomization.yaml.")],
    real: Annotated[bool, typer.Option("--real", help="By the Kustomize that is installed.")] = False,
) -> None:
    """Prints what a folder renders to."""
    command = kustomize.installed()
    if real and not command:
        raise UserError("neither kustomize nor kubectl is installed; leave --real away")
    print(yaml.safe_dump_all(kustomize.render(folder, command if real else None), sort_keys=False), end="")


@app.command()
def rules() -> None:
    """Lists the rules."""
    for name, rule in RULES.items():
        print(f"{name}: {' '.join(str(rule.__doc__).split())}")


def main() -> None:
    """Errors that a person can mend are one line, and status 2."""
    try:
        app(prog_name="python -m cluster.manifests")
    except UserError as error:
        print(f"manifests: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
