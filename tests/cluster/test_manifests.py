"""k8s/: objects of the site, and examples that are in step with `vz-ray k8s render`."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from scripts.k8s_examples import example_arguments, prometheus_rule, render_example
from tests.cluster.manifests import EXAMPLES, K8S, ROOT, example, kustomize, locked_ray_version
from vz_ray.k8s.manifest import Manifest, Workload, parse_quantity, workload_of
from vz_ray.k8s.rules import SECRET_KEYS, find_problems, secret_references

KUBERNETES_VERSION = "1.34"
SCHEMAS = json.loads((ROOT / "tests/cluster/kuberay.schema.json").read_text())
"""KubeRay 1.7.0, from scripts/kuberay_schemas.py."""
KIND_CPUS, KIND_GIB = 8.0, 20.0
"""Machine of the rehearsal."""
KIND_SYSTEM_CPUS, KIND_SYSTEM_GIB = 1.1, 1.0
"""Requests of kind's own pods (API server 250m, controllers 200m, scheduler, etcd, kindnet 100m each, both pods of
coredns 200m) and of the operator (100m)."""
DOCS = ROOT / "docs" / "kubernetes.md"


def with_defaults(schema: Manifest, value: Any) -> Any:
    """Fill in the schema's defaults, as the API server does."""
    if "$ref" in schema:
        return with_defaults(SCHEMAS["$defs"]["RayCluster"]["properties"]["spec"], value)
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


def check_kuberay_schema(manifest: Manifest) -> None:
    schema = SCHEMAS["$defs"][manifest["kind"]]
    validator = jsonschema.Draft7Validator({**SCHEMAS, "$ref": f"#/$defs/{manifest['kind']}"})
    validator.validate(with_defaults(schema, manifest))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_what_render_prints(name: str) -> None:
    arguments = example_arguments()
    assert sorted(arguments) == EXAMPLES
    text = (K8S / "examples" / f"{name}.yaml").read_text()
    assert text == render_example(arguments[name]), "run python scripts/k8s_examples.py"


def test_prometheus_rule_is_that_of_the_alerts() -> None:
    assert (K8S / "monitoring" / "rules.yaml").read_text() == prometheus_rule()
    alerts = yaml.safe_load((ROOT / "cluster/grafana/alerts.yaml").read_text())
    assert yaml.safe_load(prometheus_rule())["spec"] == alerts


def test_examples_break_no_rule(manifests: list[Manifest]) -> None:
    assert find_problems(manifests) == []


def test_workload_matches_the_kuberay_schema(workload: Workload) -> None:
    check_kuberay_schema(workload.manifest)


def test_kuberay_schema_refuses_unknown_fields_and_types() -> None:
    manifest = example("train-spot")[0]
    for path, value in (("spec.backoffLimits", 1), ("spec.backoffLimit", "3"), ("spec.rayClusterSpec.headGroup", {})):
        broken = deepcopy(manifest)
        *parents, name = path.split(".")
        target = broken
        for parent in parents:
            target = target[parent]
        target[name] = value
        with pytest.raises(jsonschema.ValidationError):
            check_kuberay_schema(broken)


def test_pods_and_core_objects_match_kubernetes_schemas(manifests: list[Manifest]) -> None:
    workload = workload_of(manifests)
    templates = [group.spec["template"] for group in workload.groups]
    templates += [t for t in [workload.spec.get("submitterPodTemplate")] if t]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates]
    for manifest in [*pods, *(m for m in manifests if m is not workload.manifest)]:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("folder", ["site", "kind", "monitoring"])
def test_site_matches_kubernetes_schemas(folder: str) -> None:
    manifests = kustomize(folder)
    for manifest in manifests:
        if not manifest["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    namespaced = [manifest for manifest in manifests if manifest["kind"] != "Namespace"]
    assert {manifest["metadata"]["namespace"] for manifest in namespaced} == {"vz-ray"}
    assert not [manifest for manifest in manifests if manifest["kind"] == "Secret"]


def test_deleting_a_workload_deletes_no_data(manifests: list[Manifest]) -> None:
    assert {m["kind"] for m in manifests} <= {"RayJob", "RayCluster", "RayService", "PodDisruptionBudget", "ConfigMap"}
    site = {(m["kind"], m["metadata"]["name"]) for m in kustomize("site")}
    assert not site & {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for pod in workload_of(manifests).pods:
        assert ("ServiceAccount", pod["serviceAccountName"]) in site
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in site


def test_ray_version_is_the_locked_one(workload: Workload) -> None:
    assert workload.cluster["rayVersion"] == locked_ray_version()


def test_rehearsal_fits_its_machine() -> None:
    workload = workload_of(example("rehearsal"))
    requests = [container["resources"]["requests"] for pod in workload.pods for container in pod["containers"]]
    if workload.cluster.get("enableInTreeAutoscaling"):
        requests.append(workload.cluster["autoscalerOptions"]["resources"]["requests"])
    assert all(group.max_replicas == 1 for group in workload.groups)
    assert sum(parse_quantity(request["cpu"]) for request in requests) <= KIND_CPUS - KIND_SYSTEM_CPUS
    memory_gib = sum(parse_quantity(request["memory"]) for request in requests) / 2**30
    assert memory_gib <= KIND_GIB - KIND_SYSTEM_GIB


def test_ray_autoscaler_reads_the_groups_of_the_spot_example() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _generate_available_node_types_from_ray_cr_spec as read_node_types,
    )

    workload = workload_of(example("train-spot"))
    node_types = read_node_types(workload.cluster)
    head = node_types.pop("headgroup")
    assert (head["resources"]["CPU"], head["resources"]["head"], head["max_workers"]) == (0, 1, 0)
    assert "GPU" not in head["resources"]
    groups = {
        name: (t["min_workers"], t["max_workers"], t["resources"].get("GPU", 0), t["resources"][name])
        for name, t in node_types.items()
    }
    assert groups == {"learner": (1, 1, 8, 1), "rollout": (0, 16, 1, 1), "clips": (1, 1, 0, 1)}
    assert node_types["rollout"]["labels"] == {"ray.io/market-type": "spot"}
    cpus = {group.name: group.resources["CPU"] for group in workload.groups[1:]}
    assert cpus == {name: node_type["resources"]["CPU"] for name, node_type in node_types.items()}


def test_service_deploys_the_production_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    manifest = yaml.safe_load(workload_of(example("serve")).spec["serveConfigV2"])
    ServeDeploySchema.model_validate(manifest)
    production = yaml.safe_load((ROOT / "conf" / "serve" / "production.yaml").read_text())
    for config in (manifest, production):
        config["applications"][0].pop("args")
    assert manifest == production


def test_docs_name_every_example_and_secret(manifests: list[Manifest]) -> None:
    text = DOCS.read_text()
    assert [name for name in (*EXAMPLES, *SECRET_KEYS) if f"`{name}`" not in text] == []
    assert {name for name, _, _ in secret_references(workload_of(manifests))} <= set(SECRET_KEYS)
