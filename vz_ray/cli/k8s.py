"""Commands for manifests of runs on Kubernetes."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app

k8s = typer.Typer(
    help="Write and check the Kubernetes manifests of a run.\n\n"
    "Example: vz-ray k8s render conf/videozoomer-7b-sft.yaml --name alice-1 model=/models/Qwen2.5-VL-7B-Instruct "
    "data=/videos/sft.json > run.yaml"
)
app.add_typer(k8s, name="k8s", no_args_is_help=True, rich_help_panel="On a cluster")

File = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Output of `vz-ray k8s render`.")]
Context = Annotated[str, typer.Option(help="Context of the kubeconfig; default: the current one.")]


@k8s.command()
def render(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[train|sft|eval|quickstart|serve] CONFIG.yaml [KEY=VALUE]...",
            help="Command to run; by default `train`, or `sft` if the config has that section.",
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the run, its objects and its run directory.")],
    gpus: Annotated[int, typer.Option(help="GPUs of the run; 0: as configured.", min=0)] = 0,
    kind: Annotated[str, typer.Option(help="job: RayJob; cluster: RayCluster; service: RayService.")] = "job",
    spot: Annotated[bool, typer.Option("--spot", help="Rollout workers on spot machines.")] = False,
    queue: Annotated[str, typer.Option(help="LocalQueue of Kueue.")] = "",
    site: Annotated[
        Path | None, typer.Option(help="Site file: nodes, claims, image of the cluster.", show_default=False)
    ] = None,
    shape: Annotated[
        str, typer.Option(help="Architecture to plan for, if the model is on the cluster only: Qwen2.5-VL-7B.")
    ] = "",
) -> None:
    """Print the manifests of a run, sized by the planner, for `kubectl apply -f -`.

    Example: vz-ray k8s render conf/videozoomer-7b-rl.yaml --name alice-1 --gpus 16 --site site.yaml
    --shape Qwen2.5-VL-7B model=/runs/alice-sft/models/policy data.train=/videos/train.json
    data.validation=/videos/validation.json > run.yaml

    Example: vz-ray k8s render serve conf/serve/7b.yaml --kind service --name agent model=/models/agent
    --shape Qwen2.5-VL-7B
    """
    from vz_ray.config.load import load_config
    from vz_ray.config.site import SiteConfig
    from vz_ray.k8s import render as rendering
    from vz_ray.k8s.run_spec import RenderRequest

    request = RenderRequest(arguments, name, kind, gpus, spot, queue, shape)
    manifests = rendering.render(request, load_config(SiteConfig, site))
    options = {"--name": name, "--gpus": gpus, "--kind": kind, "--queue": queue, "--site": site, "--shape": shape}
    defaults = {"--gpus": 0, "--kind": "job"}
    words = [
        f"{key} {shlex.quote(str(value))}" for key, value in options.items() if value and value != defaults.get(key)
    ]
    command = " ".join(["vz-ray k8s render", shlex.join(arguments), *words, *(["--spot"] if spot else [])])
    lines = textwrap.wrap(command, 112, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(rendering.to_yaml(manifests, " \\\n".join(lines)), end="")


@k8s.command()
def check(
    file: File,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Also check KubeRay, claims, secrets and names of the cluster.")
    ] = False,
    context: Context = "",
) -> None:
    """Check the manifests of a run, also after edits; with --cluster whether the cluster can take them.

    Example: vz-ray k8s check run.yaml --cluster
    """
    from vz_ray.k8s.live import Kubectl, find_missing
    from vz_ray.k8s.manifest import read_manifests
    from vz_ray.k8s.rules import find_problems

    manifests = read_manifests(file)
    problems = find_problems(manifests) + (find_missing(manifests, Kubectl(context)) if cluster else [])
    print("\n".join(problems) or f"{file}: {len(manifests)} objects, no problem")
    raise typer.Exit(1 if problems else 0)


@k8s.command()
def diff(file: File, context: Context = "") -> None:
    """Print what an apply would change on the cluster, and what KubeRay does then. Exit status 1: something.

    Example: vz-ray k8s diff run.yaml
    """
    from vz_ray.k8s.live import Kubectl, find_changes
    from vz_ray.k8s.manifest import read_manifests

    changes = find_changes(read_manifests(file), Kubectl(context))
    print("\n".join(changes) or f"{file}: no change")
    raise typer.Exit(1 if changes else 0)
