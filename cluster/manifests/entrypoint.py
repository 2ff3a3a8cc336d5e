"""What a workload runs, read as the command line reads it, and its configuration loaded for real."""

from __future__ import annotations

import ast
import shlex
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests.objects import RayWorkload
from cluster.manifests.schema import ROOT
from vz_ray.config import load_config
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.utils.errors import UserError

COMMANDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "train": (GrpoRunConfig, ("learner", "rollout", "clips")),
    "sft": (SftRunConfig, ("learner", "clips")),
    "eval": (EvalRunConfig, ("rollout", "clips")),
    "quickstart": (QuickstartConfig, ("learner", "rollout", "clips")),
}
"""Commands that a job may run: the schema of its configuration, and the groups that its actors ask for."""
SERVING = ("serve", "clips")
"""The groups that a served application's actors ask for."""


@dataclass(frozen=True, slots=True)
class Entrypoint:
    """What a workload runs.

    Attributes:
        config: Loaded, checked, with all overrides.
        groups: Markers that its actors ask for.
        named: Whether the run's name is said where it is started, and so stays the same.
    """

    config: Any
    groups: tuple[str, ...]
    named: bool


def parse_entrypoint(workload: RayWorkload) -> Entrypoint | None:
    """What runs there; none for a cluster that waits for jobs.

    Raises:
        UserError: It would end at once: no such command, file, key or value.
    """
    if workload.kind == "RayJob":
        return parse_job(str(workload.spec.get("entrypoint") or ""))
    if workload.kind == "RayService":
        return parse_application(str(workload.spec.get("serveConfigV2") or ""))
    return None


@cache
def parse_job(entrypoint: str) -> Entrypoint:
    """A job's command: `vz-ray COMMAND conf/x.yaml key=value ...`.

    Example: `job("vz-ray sft conf/videozoomer-7b-sft.yaml name=a").config.name` -> `"a"`
    """
    words = shlex.split(entrypoint)
    if len(words) < 2 or words[0] != "vz-ray" or words[1] not in COMMANDS:
        raise UserError(
            f"{' '.join(words[:2])!r} is no command; write `vz-ray` and one of {', '.join(COMMANDS)}"
        )
    schema, groups = COMMANDS[words[1]]
    given = words[2:]
    if "--name" in given:
        at = given.index("--name")
        given[at : at + 2] = [f"name={word}" for word in given[at + 1 : at + 2]]
    files = [word for word in given if word.endswith((".yaml", ".yml")) and "=" not in word]
    if len(files) != 1:
        raise UserError(
            f"it names {len(files)} config files ({', '.join(files)}); name one, such as conf/tiny.yaml"
        )
    overrides = [word for word in given if word not in files]
    config: Any = load_config(schema, file(files[0]), overrides)
    return Entrypoint(config, groups, any(word.startswith("name=") for word in overrides))


@cache
def parse_application(text: str) -> Entrypoint:
    """`serveConfigV2` of a service: its import path is found, its arguments are keys of the configuration."""
    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"serveConfigV2 is not YAML: {' '.join(str(error).split())}") from error
    applications = said.get("applications") or [] if isinstance(said, dict) else []
    if len(applications) != 1:
        raise UserError(f"serveConfigV2 has {len(applications)} applications; it must have one")
    [one] = applications
    import_path(str(one.get("import_path")))
    given = {key: str(value) for key, value in (one.get("args") or {}).items()}
    path = file(given.pop("config")) if "config" in given else None
    config = load_config(ServeConfig, path, [f"{key}={value}" for key, value in given.items()])
    if not config.model:
        raise UserError("serveConfigV2: args has no model; give a checkpoint directory on a volume")
    for deployment in one.get("deployments") or []:
        served = (deployment.get("user_config") or {}).get("model", config.model)
        if served != config.model:
            raise UserError(
                f"serveConfigV2: user_config.model is {served} and args.model {config.model}; make them "
                "equal, "
                "or a new replica starts with other weights than those that it is told to serve"
            )
    return Entrypoint(config, SERVING, True)


def file(name: str) -> Path:
    """A config file of the image, which holds this repository's."""
    if not (ROOT / name).is_file():
        raise UserError(f"there is no {name} in the image; name one below conf/")
    return ROOT / name


def import_path(path: str) -> None:
    """`UserError` unless `package.module:function` is there; only packages above it are imported."""
    module, _, name = path.partition(":")
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"import_path is {path}, and there is no module {module}")
    body = ast.parse(Path(spec.origin).read_text()).body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    if name not in functions:
        raise UserError(f"import_path is {path}, and {module} has the functions {', '.join(functions)}")
