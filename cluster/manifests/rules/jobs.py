"""Entrypoints, checkpoints, and what is done before a pod ends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from cluster.manifests.entrypoint import Entrypoint, parse_entrypoint
from cluster.manifests.objects import GPU, Bundle, NodeGroup, RayWorkload, quantity
from cluster.manifests.rules.registry import rule
from vz_ray.utils.errors import UserError

CHECKPOINT = "vz-ray/checkpoint-seconds"
"""Annotation: how long a checkpoint takes on this storage."""
ONE_MACHINE = "vz-ray/one-machine"
"""Annotation of a claim: all its pods are on one machine, so ReadWriteOnce will do."""
SPARE_S = 10.0
"""Between the end of a hook and that of the pod: Ray's own processes end in it."""
RUNS = "/runs"


@rule
def entrypoints_load(bundle: Bundle) -> Iterator[str]:
    """What is run exists, and its configuration is accepted with all overrides."""
    for workload in bundle.workloads:
        try:
            parse_entrypoint(workload)
        except UserError as error:
            yield f"{workload.label}: it would end at once: {error}"


def _loaded(bundle: Bundle) -> Iterator[tuple[RayWorkload, Entrypoint]]:
    """Workloads that run something that loads; `entrypoints_load` speaks of the others."""
    for workload in bundle.workloads:
        try:
            found = parse_entrypoint(workload)
        except UserError:
            continue
        if found:
            yield workload, found


@rule
def runs_use_this_cluster(bundle: Bundle) -> Iterator[str]:
    """What is run joins the cluster around it, and sends its actors to their groups."""
    for workload, at in _loaded(bundle):
        ray = at.config.ray
        if ray.address != "auto":
            yield (
                f"{workload.label}: ray.address is {ray.address!r}, another cluster than this; add "
                "ray.address=auto"
            )
        for key, marker in _placed(at):
            if (said := _value(at.config, key)) != marker:
                yield (
                    f"{workload.label}: {key} is {said!r}, so its actors land on any node; add {key}={marker}"
                )
        has_gpus = any(group.amount("limits", GPU) for group in workload.workers)
        if ray.use_gpus != ("always" if has_gpus else "never"):
            yield (
                f"{workload.label}: ray.use_gpus is {ray.use_gpus!r} and groups have "
                f"{'GPUs' if has_gpus else 'no GPUs'}; "
                f"add ray.use_gpus={'always' if has_gpus else 'never'}"
            )


def _placed(at: Entrypoint) -> list[tuple[str, str]]:
    """Keys that say where actors go, and the marker that each should have."""
    keys = [("group" if marker == "serve" else f"{marker}.group", marker) for marker in at.groups]
    return [*keys, *([("sft_learner.node_group", "learner")] if hasattr(at.config, "sft_learner") else [])]


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@rule
def submissions_go_on(bundle: Bundle) -> Iterator[str]:
    """A job that is submitted again goes on under the same name, and leaves no cluster behind."""
    names = {id(workload): at for workload, at in _loaded(bundle)}
    for workload in (workload for workload in bundle.workloads if workload.kind == "RayJob"):
        spec, at = workload.spec, names.get(id(workload))
        if at and not at.named:
            yield (
                f"{workload.label}: the entrypoint names no run; add name=..., so that a new submission goes "
                "on with it"
            )
        if spec.get("jobId"):
            yield f"{workload.label}: jobId is {spec['jobId']}; remove it, a second submission needs another"
        if not spec.get("backoffLimit"):
            yield (
                f"{workload.label}: backoffLimit is {spec.get('backoffLimit', 0)}; a lost head would end the "
                "run, set 1 or more"
            )
        if not spec.get("shutdownAfterJobFinishes"):
            yield (
                f"{workload.label}: shutdownAfterJobFinishes is off, so GPUs are held after the end; set true"
            )
        if spec.get("submissionMode", "K8sJobMode") != "K8sJobMode":
            yield (
                f"{workload.label}: submissionMode is {spec['submissionMode']}; K8sJobMode does not submit a "
                "job twice"
            )


@rule
def drivers_run_on_the_head(bundle: Bundle) -> Iterator[str]:
    """A job's driver asks for the head's marker: anywhere else its node may go."""
    for workload in (workload for workload in bundle.workloads if workload.kind == "RayJob"):
        asked = workload.spec.get("entrypointResources") or "{}"
        try:
            wanted = json.loads(asked)
        except ValueError:
            wanted = {}
        if not isinstance(wanted, dict) or not 0 < float(wanted.get("head", 0)) <= 1:
            yield f"{workload.label}: entrypointResources is {asked}; set '{{\"head\": 0.001}}'"
        for name in ("entrypointNumCpus", "entrypointNumGpus"):
            if workload.spec.get(name):
                yield f"{workload.label}: {name} is {workload.spec[name]}, and the head has none; remove it"


@rule
def runs_are_on_shared_storage(bundle: Bundle) -> Iterator[str]:
    """Run directories lie on a claim that head, learner and rollout see, and others could read after them."""
    loaded = {id(workload): getattr(at.config, "timeouts", None) for workload, at in _loaded(bundle)}
    claims = {claim["metadata"]["name"]: claim for claim in bundle.of("PersistentVolumeClaim")}
    for workload in (workload for workload in bundle.workloads if workload.runs_jobs):
        path = str(getattr(loaded.get(id(workload)), "runs", RUNS))
        seen: set[str] = set()
        for group in workload.groups:
            if not {"head", "learner", "rollout"} & group.node_group_resources:
                continue
            name = ((group.covering(path) or {}).get("persistentVolumeClaim") or {}).get("claimName")
            seen.add(str(name))
            modes = ((claims.get(name) or {}).get("spec") or {}).get("accessModes") or []
            one = ((claims.get(name) or {}).get("metadata", {}).get("annotations") or {}).get(ONE_MACHINE)
            if not name:
                yield (
                    f"{group.label}: runs={path} is not on a claim, and is lost with the pod; mount "
                    "vz-ray-runs there"
                )
            elif name in claims and "ReadWriteMany" not in modes and one != "true":
                yield (
                    f"PersistentVolumeClaim {name}: accessModes is {modes}, so pods on a second machine wait "
                    "for it; "
                    f'set ReadWriteMany, or annotate it {ONE_MACHINE}: "true"'
                )
        if len(seen) > 1:
            yield (
                f"{workload.label}: runs={path} is on {', '.join(sorted(seen))}; head, learner and rollout "
                "need the same"
            )


@rule
def actors_fit(bundle: Bundle) -> Iterator[str]:
    """Groups at their largest have the CPUs and GPUs that actors ask for: else they wait for ever."""
    for workload, at in _loaded(bundle):
        for marker in at.groups:
            if not workload.groups_with_resource(marker):
                yield (
                    f"{workload.label}: its actors ask for {marker}, which no group has; add a group, or "
                    f'{marker}: "1" to the resources of one'
                )
        for group in workload.workers:
            cpus = gpus = 0.0
            for marker in sorted(group.node_group_resources & set(at.groups)):
                count, cpu, gpu = _demand(at.config, marker)
                cpus, gpus = cpus + count * cpu, gpus + count * gpu
                if gpu > group.resources["GPU"] or cpu > group.resources["CPU"]:
                    yield (
                        f"{group.label}: one {marker} actor needs {gpu:g} GPUs and {cpu:g} CPUs, more than a "
                        "pod has"
                    )
            most = group.replicas()[2]
            have = {"GPU": most * group.resources["GPU"], "CPU": most * group.resources["CPU"]}
            for name, need in (("GPU", gpus), ("CPU", cpus)):
                if need > have[name]:
                    yield (
                        f"{group.label}: actors may ask for {need:g} {name} and {most} pods have "
                        f"{have[name]:g}; "
                        "raise maxReplicas or limits, or lower rollout.max_workers, learner.world_size or "
                        "clips.num_actors"
                    )


def _demand(config: Any, marker: str) -> tuple[float, float, float]:
    """How many actors of a group there may be, and the CPUs and GPUs of each."""
    gpu = 1.0 if config.ray.gpus == "always" else 0.0
    match marker:
        case "learner":
            return config.learner.ranks, 1.0, gpu
        case "rollout":
            rollout = config.rollout
            return rollout.most_workers, rollout.cpus_per_worker, gpu * rollout.engine.tensor_parallel_size
        case "serve":
            return config.max_replicas, config.cpus_per_replica, gpu * config.engine.tensor_parallel
        case _:
            # Each served replica has decoders of its own.
            return config.clips.most_actors * getattr(config, "max_replicas", 1), config.clips.cpus, 0.0


@rule
def clip_caches_fit(bundle: Bundle) -> Iterator[str]:
    """Decoded frames and downloads lie on a disk of the pod that has room for them."""
    for workload, at in _loaded(bundle):
        clips = at.config.clips
        for group in workload.groups_with_resource("clips"):
            disk = (
                (group.covering(clips.disk_cache_dir) or {}).get("emptyDir") if clips.disk_cache_dir else None
            )
            size = quantity((disk or {}).get("sizeLimit", 0))
            need = (clips.disk_cache_gib + clips.download_cache_gib) * 1e9
            if disk is None or size < need:
                yield (
                    f"{group.label}: clips.disk_cache_dir is {clips.disk_cache_dir!r} on a volume of {size / 1e9:.0f} "
                    "GB, and "
                    f"clips.disk_cache_gib and clips.download_cache_gib are {need / 1e9:.0f}; raise its sizeLimit or "
                    "lower them"
                )


def hook_seconds(group: NodeGroup, command: str) -> float:
    """The `--seconds` that a preStop hook gives a command; 0 if it does not call it."""
    found = re.search(rf"{re.escape(command)} --seconds ([0-9.]+)", group.hook())
    return float(found[1]) if found else 0.0


@rule
def checkpoints_have_time(bundle: Bundle) -> Iterator[str]:
    """A job that is ended writes its checkpoint first: hooks and pods of head and learner wait."""
    for workload in (workload for workload in bundle.workloads if workload.runs_jobs):
        try:
            takes = float(workload.annotations.get(CHECKPOINT, ""))
        except ValueError:
            yield (
                f"{workload.label}: the annotation {CHECKPOINT} is missing; set it to what a checkpoint takes"
            )
            continue
        waits = float(workload.head.env().get("RAY_JOB_STOP_WAIT_TIME_S", {}).get("value", 3))
        if waits < takes:
            yield (
                f"{workload.head.label}: RAY_JOB_STOP_WAIT_TIME_S is {waits:g} and a checkpoint takes "
                f"{takes:g} s; "
                "Ray would kill the job over it: raise it"
            )
        for group in workload.groups:
            command = {"head": "stop-jobs", "learner": "wait-for-jobs"}.get(group.name)
            if not command:
                continue
            hook = hook_seconds(group, command)
            if hook < waits:
                yield (
                    f"{group.label}: its preStop hook gives {command} {hook:g} s and a job may take "
                    f"{waits:g}; "
                    f"call python -m cluster.hooks {command} --seconds {waits + 30:g}"
                )
            if group.grace_s < hook + SPARE_S:
                yield (
                    f"{group.label}: terminationGracePeriodSeconds is {group.grace_s:g} and its hook may "
                    f"take {hook:g}; "
                    f"set {hook + 30:g}"
                )


@rule
def nodes_are_drained(bundle: Bundle) -> Iterator[str]:
    """Pods that may go tell Ray first, and stay until what they do is done."""
    loaded = {id(workload): getattr(at.config, "timeouts", None) for workload, at in _loaded(bundle)}
    for workload in bundle.workloads:
        for group in workload.workers:
            if group.name == "learner":
                continue
            drain, idle = hook_seconds(group, "vz-ray drain"), hook_seconds(group, "cluster.hooks wait-idle")
            least = float(getattr(loaded.get(id(workload)), "drain_s", 1.0))
            if min(drain, idle) < least:
                yield (
                    f"{group.label}: its preStop hook is {group.hook()!r}; call `vz-ray drain --seconds N; "
                    "python -m "
                    f"cluster.hooks wait-idle --seconds N` with N of at least {least:g}"
                )
            elif group.grace_s < max(drain, idle) + SPARE_S:
                yield (
                    f"{group.label}: terminationGracePeriodSeconds is {group.grace_s:g} and draining may "
                    "take "
                    f"{max(drain, idle):g}; set {max(drain, idle) + 30:g}"
                )
