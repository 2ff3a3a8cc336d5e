"""A run as its pods start it: command, config file, and overrides derived from the request and the site."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.load import is_config_file, load_config, sets_section, split_arguments, to_yaml
from vz_ray.config.quickstart import QuickstartConfig, quickstart_file
from vz_ray.config.run import GrpoRunConfig, RolloutRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.config.site import SiteConfig
from vz_ray.families import ModelShape, load_model_shape
from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.jobs.submit import input_paths
from vz_ray.utils.errors import UserError
from vz_ray.utils.resources import find_shipped

KINDS = ("job", "cluster", "service")
COMMANDS: dict[str, type[ClusterConfig]] = {
    "train": GrpoRunConfig,
    "sft": SftRunConfig,
    "eval": EvalRunConfig,
    "quickstart": QuickstartConfig,
    "serve": ServeConfig,
}
"""Config class of each command that can be rendered."""
MAX_NAME_LENGTH = 47
"""KubeRay adds suffixes to the names of jobs and services; Kubernetes allows 63 characters."""
SPOT_WAIT_S = 86400
"""Time for which a run waits for the first rollout worker on spot nodes."""
SCRATCH = "/scratch"
CONFIG_DIR = "/etc/vz-ray"
"""Mount of the config map of a config file that is not part of the image."""


@dataclass(frozen=True, slots=True)
class RenderRequest:
    """Arguments of `vz-ray k8s render`.

    Attributes:
        arguments: `[COMMAND] CONFIG.yaml [KEY=VALUE]...`.
        name: Name of the run, of its objects and of its run directory.
        kind: One of `KINDS`.
        gpus: GPUs of the run; 0: as configured.
        spot: Rollout workers run on spot machines.
        queue: Kueue's LocalQueue; empty: none.
        shape: Architecture to plan for, if the model's files are not readable here.
    """

    arguments: Sequence[str]
    name: str
    kind: str = "job"
    gpus: int = 0
    spot: bool = False
    queue: str = ""
    shape: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.name) or len(self.name) > MAX_NAME_LENGTH:
            raise UserError(
                f"--name is {self.name!r}; Kubernetes needs lower-case letters, digits and '-', a letter first and at "
                f"most {MAX_NAME_LENGTH} characters, for example alice-1"
            )
        if self.kind not in KINDS:
            raise UserError(f"--kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run as its pods start it.

    Attributes:
        request: What was asked for.
        command: One of `COMMANDS`.
        file: Config file in the container.
        overrides: Overrides of the command line, in order.
        config: The config that results.
        config_text: Content of a config file that is not part of the image; empty: the file is.
        shape: Shape of the model.
        gpus: Engines and learner use GPUs.
    """

    request: RenderRequest
    command: str
    file: str
    overrides: tuple[str, ...]
    config: Any
    config_text: str
    shape: ModelShape
    gpus: bool

    @property
    def shares_gpus(self) -> bool:
        return isinstance(self.config, GrpoRunConfig) and self.config.shares_gpus


def load_run(request: RenderRequest, site: SiteConfig) -> RunSpec:
    """Resolve a request: find the command, derive the overrides, load and check the config.

    Raises:
        UserError: The config is invalid, or cannot run in the pods of the site.
    """
    command, file, overrides = _parse(request)
    schema = COMMANDS[command]
    config = load_config(schema, file, overrides)
    gpus = config.ray.use_gpus == "always" or (config.ray.use_gpus == "auto" and site.gpu_node.gpus > 0)
    if gpus and not site.gpu_node.gpus:
        raise UserError("ray.use_gpus is always, and the site has no GPUs: set gpu_node.gpus in the site file")
    if request.gpus and not gpus:
        raise UserError(f"--gpus is {request.gpus}, and the run uses none: set ray.use_gpus=always, or omit --gpus")
    shipped = find_shipped(file) is not None
    named = [*overrides, *_run_overrides(request, config, overrides), *_size_overrides(request, config)]
    named += _placement_overrides(config, site, gpus=gpus)
    final = load_config(schema, file, named)
    _check_paths(final, request.kind, site)
    shape = load_model_shape(request.shape) if request.shape else _shape_of(str(final.model))
    return RunSpec(
        request=request,
        command=command,
        file=file if shipped else f"{CONFIG_DIR}/config.yaml",
        overrides=tuple(named),
        config=final,
        config_text="" if shipped else to_yaml(load_config(schema, file)),
        shape=shape,
        gpus=gpus,
    )


def _parse(request: RenderRequest) -> tuple[str, str, list[str]]:
    """Return command, config file and overrides of the arguments."""
    arguments = list(request.arguments)
    command = ""
    if arguments and "=" not in arguments[0] and not is_config_file(arguments[0]):
        command = arguments.pop(0)
    file, overrides = split_arguments(arguments)
    if file is None and command == "quickstart":
        file = quickstart_file(overrides)
    if file is None:
        raise UserError("got 0 config files; give one, for example conf/videozoomer-7b-rl.yaml")
    if request.kind == "service":
        command = command or "serve"
    command = command or ("sft" if sets_section(file, overrides, "sft") else "train")
    if command not in COMMANDS:
        raise UserError(f"{command!r} cannot be rendered; use one of {', '.join(COMMANDS)}")
    if (command == "serve") != (request.kind == "service"):
        raise UserError(f"--kind is {request.kind} and the command is {command}; `serve` and only it needs service")
    return command, file, overrides


def _run_overrides(request: RenderRequest, config: ClusterConfig, given: Sequence[str]) -> list[str]:
    """Return name and directories; a directory that is given is kept."""
    keys = {override.partition("=")[0] for override in given}
    if "name" in keys and not isinstance(config, ServeConfig):
        raise UserError(f"name is {config.name!r}; --name sets it, remove name=")
    if isinstance(config, ServeConfig):
        values = {"log_dir": f"/runs/{request.name}", "files.directory": "/uploads"}
    else:
        values = {"name": request.name, "runs": "/runs"}
    values["clips.disk_cache_dir"] = f"{SCRATCH}/clips"
    return [f"{key}={value}" for key, value in values.items() if key not in keys]


def _size_overrides(request: RenderRequest, config: ClusterConfig) -> list[str]:
    """Return the numbers of ranks and engines for `--gpus` and `--spot`."""
    gpus, spot = request.gpus, request.spot
    if isinstance(config, SftRunConfig):
        if spot:
            raise UserError("--spot is given; SFT has no rollout workers, and its learner needs on-demand nodes")
        return [f"learner.world_size={gpus}"] if gpus else []
    size = config.engine.tensor_parallel_size if isinstance(config, ServeConfig) else 1
    if isinstance(config, ServeConfig):
        if spot:
            raise UserError("--spot is given; a service answers requests, so its engines need on-demand nodes")
        replicas = _engines(gpus, 0, size)
        return [f"max_replicas={replicas}", f"min_replicas={min(config.min_replicas, replicas)}"] if gpus else []
    assert isinstance(config, RolloutRunConfig)
    if isinstance(config, GrpoRunConfig) and config.shares_gpus:
        if spot:
            raise UserError(
                "--spot is given; engines share the learner's GPUs (train.colocate or weights.transport), which "
                "must be on demand: use conf/videozoomer-7b-rl-split.yaml"
            )
        shared = gpus - _teacher_gpus(config)
        return [f"learner.world_size={shared}", f"rollout.num_workers={shared}"] if gpus else []
    ranks = config.learner.world_size + _teacher_gpus(config) if isinstance(config, GrpoRunConfig) else 0
    engines = _engines(gpus, ranks, config.rollout.engine.tensor_parallel_size) if gpus else config.rollout.worker_limit
    if spot:
        return [
            "rollout.num_workers=0",
            f"rollout.max_workers={engines}",
            f"timeouts.no_workers_s={SPOT_WAIT_S}",
        ]
    if not gpus:
        return []
    if config.rollout.max_workers:
        return [f"rollout.num_workers={min(config.rollout.num_workers, engines)}", f"rollout.max_workers={engines}"]
    return [f"rollout.num_workers={engines}"]


def _teacher_gpus(config: GrpoRunConfig) -> int:
    """Return the GPUs of the teacher's engines."""
    teacher = config.teacher
    return teacher.num_workers * teacher.engine.tensor_parallel_size if teacher.enabled else 0


def _engines(gpus: int, ranks: int, size: int) -> int:
    """Return how many engines of `size` GPUs are left beside the ranks."""
    if gpus and gpus < ranks + size:
        taken = f"the learner (learner.world_size) and a teacher take {ranks}, " if ranks else ""
        raise UserError(f"--gpus is {gpus}; {taken}an engine takes {size}. Use at least {ranks + size}")
    return (gpus - ranks) // size


def _placement_overrides(config: ClusterConfig, site: SiteConfig, *, gpus: bool) -> list[str]:
    """Return the node group of each kind of actors, and the cluster to join."""
    values = {"ray.address": "auto", "ray.use_gpus": "always" if gpus else "never"}
    if isinstance(config, ServeConfig):
        return [
            f"{key}={value}" for key, value in (values | {"node_group": "serve", "clips.node_group": "serve"}).items()
        ]
    main = "rollout" if isinstance(config, EvalRunConfig) else "learner"
    if main == "learner":
        values["learner.node_group"] = "learner"
    if isinstance(config, QuickstartConfig):
        values["sft_learner.node_group"] = "learner"
    if isinstance(config, RolloutRunConfig):
        shares = isinstance(config, GrpoRunConfig) and config.shares_gpus
        if isinstance(config, GrpoRunConfig) and config.teacher.enabled:
            values["teacher.node_group"] = "teacher"
        values["rollout.node_group"] = "learner" if shares else "rollout"
    values["clips.node_group"] = "clips" if site.cpu_node.cpus else main
    return [f"{key}={value}" for key, value in values.items()]


def _check_paths(config: ClusterConfig, kind: str, site: SiteConfig) -> None:
    """Raise if a file that the run reads or writes is not on a mounted volume."""
    claims = {"/runs": site.claims.runs, "/models": site.claims.models}
    claims["/uploads" if kind == "service" else "/videos"] = (
        site.claims.uploads if kind == "service" else site.claims.videos
    )
    mounts = [mount for mount, claim in claims.items() if claim]
    paths = {"model": str(config.model)}
    if not isinstance(config, ServeConfig):
        paths |= input_paths(config) | {"runs": config.runs}
    if isinstance(config, GrpoRunConfig) and config.teacher.enabled:
        paths["teacher.model"] = config.teacher.model
    required = {"model", "runs", "data.train"} - ({"data.train"} if isinstance(config, QuickstartConfig) else set())
    for key, path in paths.items():
        if not path and key not in required:
            continue
        if find_shipped(path) or any(f"{path}/".startswith(f"{mount}/") for mount in mounts):
            continue
        problem = f"is {path!r}, which no pod mounts" if path else "is not set"
        raise UserError(f"{key} {problem}; give a path below {' or '.join(mounts)}: {key}=/{_example(key)}")


def _example(key: str) -> str:
    folder = {"model": "models", "runs": "runs"}.get(key, "videos")
    return "runs" if folder == "runs" else f"{folder}/..."


def _shape_of(model: str) -> ModelShape:
    """Return the shape of a model; the error names the option that helps if its files are on the cluster only."""
    try:
        return load_model_shape(str(find_shipped(model) or model))
    except UserError as error:
        raise UserError(f"{error}. If its files are on the cluster only: --shape Qwen2.5-VL-7B") from error
