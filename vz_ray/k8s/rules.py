"""Rules for the manifests of a run that only this project can check; no schema sees them."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vz_ray.config.load import is_config_file, load_config
from vz_ray.config.serve import ServeConfig
from vz_ray.jobs.resource_demands import resource_demands
from vz_ray.k8s.manifest import Manifest, Workload, parse_quantity, workload_of
from vz_ray.k8s.pod_spec import GPU, SPOT_LABELS
from vz_ray.k8s.render import AUTH, STOP_REASON
from vz_ray.k8s.run_spec import COMMANDS, CONFIG_DIR
from vz_ray.utils.errors import UserError

SECRET_KEYS = {
    "vz-ray-auth": ("auth_token",),
    "vz-ray-keys": ("hashes",),
    "vz-ray-judge": ("api_key",),
    "vz-ray-hub": ("token",),
    "vz-ray-wandb": ("api_key",),
    "vz-ray-registry": (".dockerconfigjson",),
}
"""Keys of the secrets that pods may use; docs/kubernetes.md lists them."""
REQUIRED_SECRETS = ("vz-ray-auth", "vz-ray-keys")
HOOK_MARGIN_S = 10.0
"""Minimum time between the end of a preStop hook and the end of the pod."""
MAX_LOST_NODE_S = 120.0
"""Maximum time after which pods on a lost node are replaced; KubeRay fails a job after 300 s without its head."""

Rule = Callable[[Workload, Any], Iterator[str]]
"""Yields a problem and its fix for each violation. The second argument is the config of the entrypoint; None for a
cluster without one."""


def find_problems(manifests: Sequence[Manifest]) -> list[str]:
    """Return one line for each rule that the manifests of a run break.

    Raises:
        UserError: The manifests have no workload, or several.
    """
    workload = workload_of(manifests)
    try:
        config = load_entrypoint(workload, manifests)
    except UserError as error:
        return [f"{workload.kind} {workload.name}: its entrypoint fails: {error}"]
    problems = [problem for rule in RULES for problem in rule(workload, config)]
    problems += _check_other_objects(workload, manifests)
    return [f"{workload.kind} {workload.name}: {problem}" for problem in problems]


def load_entrypoint(workload: Workload, manifests: Sequence[Manifest]) -> Any:
    """Load the config of a workload with all overrides, as its driver does; None for a cluster.

    Raises:
        UserError: The command is unknown, it names no run, or the config is invalid.
    """
    if workload.kind == "RayCluster":
        return None
    if workload.kind == "RayService":
        arguments = dict(workload.serve_application["args"])
        file = str(arguments.pop("config", ""))
        overrides = [f"{key}={value}" for key, value in arguments.items()]
        return _load(ServeConfig, file, overrides, manifests)
    program, command, *words = shlex.split(workload.spec["entrypoint"])
    if program != "vz-ray" or command not in COMMANDS:
        raise UserError(f"it starts with {program} {command}; use vz-ray {' or '.join(COMMANDS)}")
    overrides = [word for word in words if not is_config_file(word)]
    if not any(word.startswith("name=") for word in overrides):
        raise UserError("it has no name=; a job that is submitted again resumes the run of that name")
    file = next((word for word in words if is_config_file(word)), "")
    return _load(COMMANDS[command], file, overrides, manifests)


def _load(schema: type, file: str, overrides: list[str], manifests: Sequence[Manifest]) -> Any:
    if not file.startswith(CONFIG_DIR):
        return load_config(schema, file or None, overrides)
    data: Manifest = next((m["data"] for m in manifests if m["kind"] == "ConfigMap"), {})
    text = data.get(Path(file).name)
    if text is None:
        raise UserError(f"{file} is in no config map of the file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file).name
        path.write_text(text)
        return load_config(schema, path, overrides)


def _check_other_objects(workload: Workload, manifests: Sequence[Manifest]) -> Iterator[str]:
    """Data outlives workloads, and names are per run: other objects belong to this run, and none holds data."""
    for manifest in manifests:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind in ("Namespace", "PersistentVolumeClaim", "Secret"):
            yield f"{kind} {name} is in the same file, and deleting the run would delete it; move it to k8s/site"
        elif not name.startswith(workload.name):
            yield f"{kind} {name} is not named after the run, so that two runs share it; use {workload.name}-..."


def _check_actors(workload: Workload, config: Any) -> Iterator[str]:
    """Every actor has a node group whose pods can hold all actors."""
    if config is None:
        return
    gpus = any(group.resources["GPU"] for group in workload.groups)
    wanted = "always" if gpus else "never"
    if (config.ray.address, config.ray.use_gpus) != ("auto", wanted):
        yield f"ray.address is {config.ray.address!r} and ray.use_gpus {config.ray.use_gpus}; use auto and {wanted}"
    used: dict[str, tuple[float, float]] = {}
    groups = {group.name: group for group in workload.groups[1:]}
    for demand in resource_demands(config, gpus=gpus):
        group = groups.get(demand.node_group)
        if group is None:
            yield f"{demand.name} need the node group {demand.node_group!r}, which no worker group has; add it"
            continue
        cpus, gpus_each = demand.resources["CPU"], demand.resources.get("GPU", 0.0)
        if cpus > group.resources["CPU"] or gpus_each > group.resources["GPU"]:
            yield f"one of the {demand.name} ({demand}) fits no pod of {group.name}; enlarge its resources"
        total = used.get(group.name, (0.0, 0.0))
        used[group.name] = (total[0] + demand.max_count * cpus, total[1] + demand.max_count * gpus_each)
    for name, (cpus, gpus_used) in used.items():
        group = groups[name]
        total_cpus = group.max_replicas * group.resources["CPU"]
        total_gpus = group.max_replicas * group.resources["GPU"]
        if cpus > total_cpus or gpus_used > total_gpus:
            yield (
                f"the actors of {name} need {cpus:g} CPUs and {gpus_used:g} GPUs, its pods have {total_cpus:g} and "
                f"{total_gpus:g}; raise maxReplicas or the pods' resources"
            )


def _check_group_resources(workload: Workload, config: Any) -> Iterator[str]:
    for group in workload.groups:
        if group.resources.get(group.name) != 1:
            yield f"{group.name} does not advertise its node group; set resources {group.name}: '1'"
        if group.labels.get("vz-ray/group") != group.name:
            yield f"the label vz-ray/group of {group.name} is {group.labels.get('vz-ray/group')}; use {group.name}"
        requests = group.container["resources"]["requests"]
        if parse_quantity(requests.get(GPU, 0)) != group.limits.get(GPU, 0.0):
            yield f"{group.name} requests {requests.get(GPU, 0)} GPUs and its limit differs; use one number"
    head = workload.groups[0]
    if head.resources["CPU"] or head.resources["GPU"]:
        yield "the head advertises CPUs or GPUs, and actors would run beside the driver; set resources CPU: '0'"


def _check_disks(workload: Workload, config: Any) -> Iterator[str]:
    """Caches fit their volume, volumes fit the pod's disk, Ray's objects fit /dev/shm, and /dev/shm the memory."""
    for group in workload.groups:
        empty_dirs = {v["name"]: v["emptyDir"] for v in group.pod["volumes"] if "emptyDir" in v}
        sizes = {name: parse_quantity(volume["sizeLimit"]) for name, volume in empty_dirs.items()}
        shm = sizes.pop("shared-memory", 0.0)
        if sum(sizes.values()) > group.limits.get("ephemeral-storage", 0.0):
            yield f"the volumes of {group.name} are larger than its ephemeral-storage; raise it to their sum"
        store = float(group.spec["rayStartParams"].get("object-store-memory", 0))
        if store > shm or shm >= group.limits["memory"]:
            yield f"{group.name} needs object-store-memory <= /dev/shm < memory; raise shared-memory or memory"
        decoders = config is not None and config.clips.node_group == group.name
        volume = group.volume_of(config.clips.disk_cache_dir) if decoders else None
        if decoders and (volume is None or "emptyDir" in volume):
            needed = (config.clips.disk_cache_gib + config.clips.download_cache_gib) * 2**30
            if volume is None or needed > parse_quantity(volume["emptyDir"]["sizeLimit"]):
                yield f"the caches of clips do not fit {config.clips.disk_cache_dir!r} of {group.name}; lower them"


def _check_run_directory(workload: Workload, config: Any) -> Iterator[str]:
    if config is None or isinstance(config, ServeConfig):
        return
    for group in workload.groups:
        mount, volume = group.mount_of(config.runs), group.volume_of(config.runs)
        if not group.node_groups & {"head", "learner", "rollout"}:
            continue
        claim = (volume or {}).get("persistentVolumeClaim")
        if mount is None or claim is None:
            yield f"runs {config.runs!r} is on no claim in {group.name}; mount one there"
        elif mount.get("readOnly") or claim.get("readOnly"):
            yield f"runs {config.runs!r} is mounted read-only in {group.name}; remove readOnly"


def _check_image(workload: Workload, config: Any) -> Iterator[str]:
    version = str(workload.cluster["rayVersion"])
    images = {container["image"] for pod in workload.pods for container in pod["containers"]}
    if len(images) > 1:
        yield f"it has {len(images)} images, {' and '.join(sorted(images))}; nodes with other code are refused, use one"
    for image in images:
        if not re.search(rf":.*(^|-)ray{re.escape(version)}(-|$)", image):
            yield f"the tag of {image} does not name Ray {version}, its rayVersion; use vz-ray:...-ray{version}-..."


def _check_stop_times(workload: Workload, config: Any) -> Iterator[str]:
    """Checkpoint <= Ray's wait <= hook < grace period."""
    groups = {group.name: group for group in workload.groups}
    if workload.kind != "RayService":
        stop = re.match(r"[0-9]+", workload.manifest["metadata"].get("annotations", {}).get(STOP_REASON, ""))
        wait_s = float(groups["head"].env.get("RAY_JOB_STOP_WAIT_TIME_S", {}).get("value", 3))
        if stop is None or wait_s < float(stop[0]):
            yield f"RAY_JOB_STOP_WAIT_TIME_S is {wait_s:g}; a stop needs the time in the annotation {STOP_REASON}"
        for name, command in (("head", "stop-jobs"), ("learner", "wait-idle")):
            if name in groups and groups[name].hook_seconds(command) < wait_s:
                yield f"the hook of {name} ends before Ray kills the job; use {command} --seconds {wait_s + 30:g}"
    min_drain_s = config.timeouts.drain_s if isinstance(config, ServeConfig) else 1.0
    for group in workload.groups[1:]:
        if group.name != "learner":
            drain_s = min(group.hook_seconds("vz-ray drain"), group.hook_seconds("cluster.hooks wait-idle"))
            if drain_s < min_drain_s:
                yield f"the preStop hook of {group.name} drains for {drain_s:g} s; use at least {min_drain_s:g}"
    for group in workload.groups:
        commands = ("stop-jobs", "vz-ray drain", "wait-idle")
        hook_s = max(group.hook_seconds(command) for command in commands)
        grace_s = float(group.pod["terminationGracePeriodSeconds"])
        if hook_s and grace_s < hook_s + HOOK_MARGIN_S:
            yield f"the grace period of {group.name} is {grace_s:g} s; its hook takes {hook_s:g}, use {hook_s + 30:g}"


def _check_lost_nodes(workload: Workload, config: Any) -> Iterator[str]:
    for group in workload.groups:
        seconds = {
            toleration["key"]: toleration.get("tolerationSeconds")
            for toleration in group.pod.get("tolerations", [])
            if toleration.get("effect") == "NoExecute"
        }
        for state in ("unreachable", "not-ready"):
            value = seconds.get(f"node.kubernetes.io/{state}")
            if value is None or value > MAX_LOST_NODE_S:
                yield f"{group.name} stays on a node that is {state} for 300 s; tolerate it for 30 s"


def _check_spot(workload: Workload, config: Any) -> Iterator[str]:
    """Spot groups tolerate and ask for spot nodes; head and learner avoid them."""
    keys = {key for key, _ in SPOT_LABELS}
    for group in workload.groups:
        tolerations = group.pod.get("tolerations", [])
        tolerates = any(t.get("effect") != "NoExecute" and t.get("key", "") in {*keys, ""} for t in tolerations)
        asks = "'operator': 'In'" in str(group.pod.get("affinity", {}))
        if {group.is_spot, tolerates, asks} == {True, False}:
            yield f"{group.name} needs Ray's label, tolerations and affinity of spot nodes together, or none of them"
        if group.is_spot and group.node_groups & {"head", "learner"}:
            yield f"{group.name} is on spot nodes; its loss ends the step, so it needs on-demand nodes"


def _check_secrets(workload: Workload, config: Any) -> Iterator[str]:
    if workload.cluster.get("authOptions") != AUTH:
        yield f"authOptions is {workload.cluster.get('authOptions')}; anyone could run code, use {AUTH}"
    for name, key, optional in secret_references(workload):
        if key not in SECRET_KEYS.get(name, ()):
            yield f"secret {name} with key {key} is unknown; docs/kubernetes.md lists the secrets"
        elif optional == (name in REQUIRED_SECRETS):
            yield f"secret {name}: optional is {optional}; use {not optional}"


def secret_references(workload: Workload) -> list[tuple[str, str, bool]]:
    """Return name, key and `optional` of each secret that the containers of a workload use."""
    entries = [e for pod in workload.pods for c in pod["containers"] for e in c.get("env", [])]
    references = [entry.get("valueFrom", {}).get("secretKeyRef") for entry in entries]
    found = {(r["name"], r["key"], bool(r.get("optional"))) for r in references if r}
    return sorted(found)


def _check_service(workload: Workload, config: Any) -> Iterator[str]:
    """New weights change `user_config` only; Ray Serve restarts all replicas if `args` changes."""
    if workload.kind != "RayService":
        return
    application = workload.serve_application
    if "model" in application["args"]:
        yield "args has model, so that new weights restart every replica; set it in user_config only"
    agent: dict[str, Any] = next((d for d in application.get("deployments", []) if d["name"] == "Agent"), {})
    if not {"model", "version"} <= set(agent.get("user_config", {})):
        yield "the deployment Agent has no model and version in user_config; set both"


def _check_retries(workload: Workload, config: Any) -> Iterator[str]:
    limit = workload.spec.get("backoffLimit", 0)
    if workload.kind == "RayJob" and limit > 3:
        yield f"backoffLimit is {limit}; each retry deletes the logs of the last one, use at most 3"


RULES: tuple[Rule, ...] = (
    _check_actors,
    _check_group_resources,
    _check_disks,
    _check_run_directory,
    _check_image,
    _check_stop_times,
    _check_lost_nodes,
    _check_spot,
    _check_secrets,
    _check_service,
    _check_retries,
)
