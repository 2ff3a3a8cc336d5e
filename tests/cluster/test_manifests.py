"""Every overlay of k8s/: valid schemas, and the rules that only this project can check."""

from __future__ import annotations

import json
import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.manifests import (
    GPU,
    K8S,
    OVERLAYS,
    ROOT,
    Manifest,
    NodeGroup,
    Workload,
    load_entrypoint,
    locked_ray_version,
    parse_quantity,
    render,
    workload_of,
)

NODE_GROUPS = {"head", "learner", "rollout", "clips", "serve"}
SPOT_TAINTS = {
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
    "karpenter.sh/capacity-type",
    "eks.amazonaws.com/capacityType",
    "vz-ray/spot",
}
CHECKPOINT_SECONDS = "vz-ray/checkpoint-seconds"
"""Annotation: duration of a checkpoint on this storage."""
ONE_MACHINE = "vz-ray/one-machine"
"""Annotation of a claim whose pods run on one machine, so ReadWriteOnce is enough."""
HOOK_MARGIN_S = 10.0
"""Time between the end of a preStop hook and the end of the pod."""
DOCS = ROOT / "docs" / "kubernetes.md"


def crd_folder() -> Path:
    """Return the folder with KubeRay's JSON schemas (`RayJob.v1.schema.json`, ...); skip without them."""
    configured = os.environ.get("VZ_RAY_CRDS")
    folders = [Path(configured)] if configured else [ROOT / "shared/crds", ROOT.parent / "shared/crds"]
    for folder in folders:
        if (folder / "RayJob.v1.schema.json").is_file():
            return folder
    pytest.skip("KubeRay's schemas are not available (set VZ_RAY_CRDS to their folder)")


def with_defaults(schema: Manifest, value: Any) -> Any:
    """Fill in the schema's defaults, as the API server does."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items") or {}, item) for item in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, property_schema in (schema.get("properties") or {}).items():
        if name not in filled and "default" in property_schema:
            filled[name] = deepcopy(property_schema["default"])
        if name in filled:
            filled[name] = with_defaults(property_schema, filled[name])
    return filled


def test_core_objects_match_kubernetes_schemas(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if not manifest["apiVersion"].startswith(("ray.io/", "monitoring.coreos.com/")):
            kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_workload_matches_the_kuberay_schema(workload: Workload) -> None:
    schema = json.loads((crd_folder() / f"{workload.kind}.v1.schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(with_defaults(schema, workload.manifest))


def test_overlay_uses_one_namespace(manifests: list[Manifest]) -> None:
    assert {m["metadata"]["namespace"] for m in manifests if m["kind"] != "Namespace"} == {"vz-ray"}
    assert not [manifest for manifest in manifests if manifest["kind"] == "Secret"]


def test_actors_are_placed_in_node_groups(workload: Workload, entrypoint) -> None:
    config, node_groups = entrypoint
    has_gpus = any(group.resources["GPU"] for group in workload.groups)
    assert (config.ray.address, config.ray.use_gpus) == ("auto", "always" if has_gpus else "never")
    for name in node_groups:
        section = config if name == "serve" else getattr(config, name)
        assert section.node_group == placed_in(config, name)
        assert any(section.node_group in group.node_groups for group in workload.groups)


def placed_in(config: Any, name: str) -> str:
    """Return the node group of a kind of actors; engines that share GPUs with the learner are placed in its group."""
    return "learner" if name == "rollout" and getattr(config, "shares_gpus", False) else name


def required_resources(config: Any, name: str) -> tuple[float, float, float]:
    """Return the maximum number of actors of a node group, and the CPUs and GPUs of each."""
    gpus = 1.0 if config.ray.use_gpus == "always" else 0.0
    match name:
        case "learner":
            return config.learner.world_size, 1.0, gpus * getattr(config, "gpu_share", 1.0)
        case "rollout":
            rollout = config.rollout
            gpus *= config.gpu_share * rollout.engine.tensor_parallel_size
            return rollout.worker_limit, rollout.cpus_per_worker, gpus
        case "serve":
            return config.max_replicas, config.cpus_per_replica, gpus * config.engine.tensor_parallel_size
    # Each served replica has its own decoders.
    return config.clips.actor_limit * getattr(config, "max_replicas", 1), config.clips.cpus_per_actor, 0.0


def test_actors_fit_their_node_groups(workload: Workload, entrypoint) -> None:
    config, node_groups = entrypoint
    for group in workload.groups[1:]:
        total_cpus = total_gpus = 0.0
        for name in (name for name in node_groups if placed_in(config, name) in group.node_groups):
            count, cpus, gpus = required_resources(config, name)
            assert (cpus, gpus) <= (group.resources["CPU"], group.resources["GPU"]), (group.name, name)
            total_cpus, total_gpus = total_cpus + count * cpus, total_gpus + count * gpus
        assert total_cpus <= group.max_replicas * group.resources["CPU"], group.name
        assert total_gpus <= group.max_replicas * group.resources["GPU"], group.name


def test_clip_caches_fit_their_disk(workload: Workload, entrypoint) -> None:
    config, _ = entrypoint
    clips = config.clips
    for group in workload.groups:
        if "clips" in group.node_groups:
            volume = group.volume_of(clips.disk_cache_dir)
            assert volume is not None, f"{clips.disk_cache_dir!r} is not on a volume"
            size = parse_quantity(volume["emptyDir"]["sizeLimit"])
            assert (clips.disk_cache_gib + clips.download_cache_gib) * 1e9 <= size


def test_runs_are_on_a_shared_claim(manifests: list[Manifest], workload: Workload) -> None:
    if workload.kind == "RayService":
        pytest.skip("a service has no run directory")
    loaded = load_entrypoint(workload)
    runs = loaded[0].runs if loaded else "/runs"
    claims = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    names = set()
    for group in workload.groups:
        if group.node_groups & {"head", "learner", "rollout"}:
            volume = group.volume_of(runs)
            assert volume is not None, f"{group.name}: {runs} is not on a volume"
            names.add(volume["persistentVolumeClaim"]["claimName"])
    (name,) = names
    one_machine = claims[name]["metadata"].get("annotations", {}).get(ONE_MACHINE) == "true"
    assert one_machine or "ReadWriteMany" in claims[name]["spec"]["accessModes"]


def test_image_and_ray_version_match_the_lock(workload: Workload) -> None:
    assert workload.cluster["rayVersion"] == locked_ray_version()
    (image,) = {container["image"] for pod in workload.pods for container in pod["containers"]}
    assert re.search(rf":.*(^|-)ray{re.escape(locked_ray_version())}(-|$)", image), image


def test_checkpoint_fits_the_stop_time_of_a_job(workload: Workload) -> None:
    if workload.kind == "RayService":
        pytest.skip("a service has no checkpoint")
    checkpoint_s = float(workload.manifest["metadata"]["annotations"][CHECKPOINT_SECONDS])
    groups = {group.name: group for group in workload.groups}
    stop_s = float(groups["head"].env["RAY_JOB_STOP_WAIT_TIME_S"]["value"])
    assert stop_s >= checkpoint_s
    for name, command in (("head", "stop-jobs"), ("learner", "wait-idle")):
        if name in groups:
            hook_s = groups[name].hook_seconds(command)
            assert hook_s >= stop_s, name
            assert groups[name].pod["terminationGracePeriodSeconds"] >= hook_s + HOOK_MARGIN_S, name


def test_worker_pods_drain_before_they_stop(workload: Workload) -> None:
    loaded = load_entrypoint(workload)
    min_drain_s = getattr(loaded[0].timeouts, "drain_s", 1.0) if loaded else 1.0
    for group in workload.groups[1:]:
        if group.name != "learner":
            drain_s, idle_s = (group.hook_seconds(command) for command in ("vz-ray drain", "cluster.hooks wait-idle"))
            assert min(drain_s, idle_s) >= min_drain_s, group.name
            grace_s = group.pod["terminationGracePeriodSeconds"]
            assert grace_s >= max(drain_s, idle_s) + HOOK_MARGIN_S, group.name


def test_groups_advertise_their_node_group(workload: Workload) -> None:
    for group in workload.groups:
        assert group.node_groups <= NODE_GROUPS, group.name
        assert group.resources[group.name] == 1
        assert group.labels["vz-ray/group"] == group.name
    head = workload.groups[0]
    assert (head.resources["CPU"], head.resources["GPU"]) == (0, 0)


def is_spot(group: NodeGroup) -> bool:
    return group.spec.get("labels", {}).get("ray.io/market-type") == "spot"


def test_spot_tolerations_match_spot_labels(workload: Workload) -> None:
    for group in workload.groups:
        tolerations = group.pod.get("tolerations", [])
        tolerates_spot = any("key" not in t or t["key"] in SPOT_TAINTS for t in tolerations)
        assert tolerates_spot == is_spot(group), group.name
        assert not (is_spot(group) and {"head", "learner"} & group.node_groups), group.name


def test_ray_requires_the_token(workload: Workload) -> None:
    assert workload.cluster["authOptions"] == {"mode": "token", "secretName": "vz-ray-auth"}


def test_secrets_are_listed_in_required_yaml(workload: Workload) -> None:
    listed = yaml.safe_load((K8S / "required.yaml").read_text())["secrets"]
    for pod in workload.pods:
        for entry in (entry for container in pod["containers"] for entry in container.get("env", [])):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                secret = listed[reference["name"]]
                assert reference["key"] in secret["keys"]
                assert bool(reference.get("optional")) == secret["optional"], entry["name"]


def test_ray_autoscaler_reads_the_groups_of_the_spot_overlay() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _generate_available_node_types_from_ray_cr_spec as read_node_types,
    )

    workload = workload_of(render("spot"))
    node_types = read_node_types(workload.cluster)
    head = node_types.pop("headgroup")
    assert (head["resources"]["CPU"], head["resources"]["head"], head["max_workers"]) == (0, 1, 0)
    assert "GPU" not in head["resources"]
    groups = {
        name: (t["min_workers"], t["max_workers"], t["resources"].get("GPU", 0), t["resources"][name])
        for name, t in node_types.items()
    }
    assert groups == {"learner": (1, 1, 8, 1), "rollout": (0, 16, 1, 1), "clips": (1, 2, 0, 1)}
    assert node_types["rollout"]["labels"] == {"ray.io/market-type": "spot"}
    cpus = {group.name: group.resources["CPU"] for group in workload.groups[1:]}
    assert cpus == {name: node_type["resources"]["CPU"] for name, node_type in node_types.items()}


def test_service_matches_the_production_config() -> None:
    manifest = yaml.safe_load(workload_of(render("serve")).spec["serveConfigV2"])
    production = yaml.safe_load((ROOT / "conf" / "serve" / "production.yaml").read_text())
    for config in (manifest, production):
        config["applications"][0].pop("args")
    assert manifest == production


def test_gpu_requests_equal_limits(workload: Workload) -> None:
    for group in workload.groups:
        resources = group.container["resources"]
        assert resources["requests"].get(GPU) == resources["limits"].get(GPU), group.name


def test_docs_name_every_overlay_component_and_secret() -> None:
    text = DOCS.read_text()
    names = [*OVERLAYS, *(path.name for path in (K8S / "components").iterdir())]
    names += list(yaml.safe_load((K8S / "required.yaml").read_text())["secrets"])
    assert [name for name in names if f"`{name}`" not in text] == []
