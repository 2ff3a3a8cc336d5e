"""Write tests/cluster/kuberay.schema.json: strict JSON schemas of KubeRay's objects, from its CRDs.

python scripts/kuberay_schemas.py FOLDER    # config/crd/bases of the KubeRay repository

Unlike the API server, which drops unknown fields, the schemas refuse them. Parts that Kubernetes itself defines, such
as pod templates, are left out; tests check them against Kubernetes' schemas. The CRDs are Apache-2.0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "cluster" / "kuberay.schema.json"
CLUSTER_FIELDS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
KUBERNETES_FIELDS = (
    "template",
    "submitterPodTemplate",
    "headService",
    "serveService",
    "ingressOptions",
    "env",
    "envFrom",
    "resources",
    "securityContext",
    "volumeMounts",
)
"""Fields with types of Kubernetes."""


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a structural schema without descriptions that refuses unknown fields."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {key: schema[key] for key in ("type", "enum", "required", "default", "minimum", "maximum") if key in schema}
    if "items" in schema:
        kept["items"] = strict(schema["items"])
    if "properties" in schema:
        properties = schema["properties"].items()
        kept["properties"] = {
            name: {} if name in KUBERNETES_FIELDS else strict(child) for name, child in properties if name != "status"
        }
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = strict(schema["additionalProperties"])
    return kept


def convert(folder: Path) -> dict[str, Any]:
    """Return the schema of each kind; RayJob and RayService refer to that of RayCluster's spec."""
    kinds: dict[str, Any] = {}
    for kind in ("RayCluster", "RayJob", "RayService"):
        crd = yaml.safe_load((folder / f"ray.io_{kind.lower()}s.yaml").read_text())
        (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
        kinds[kind] = strict(version["schema"]["openAPIV3Schema"])
        kinds[kind]["properties"]["metadata"] = {"type": "object"}
        if kind in CLUSTER_FIELDS:
            kinds[kind]["properties"]["spec"]["properties"][CLUSTER_FIELDS[kind]] = {
                "$ref": "#/$defs/RayCluster/properties/spec"
            }
    return {"$defs": kinds}


def main() -> None:
    """Write the schemas."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python scripts/kuberay_schemas.py FOLDER; clone KubeRay and give its config/crd/bases")
    OUTPUT.write_text(json.dumps(convert(Path(sys.argv[1])), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
