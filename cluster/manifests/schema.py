"""Manifests against schemas: types, required fields, and no field that nobody knows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = "1.34"
"""The version of Kubernetes whose schemas objects are held to."""

_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_RELABELING = {
    "type": "object",
    "additionalProperties": False,
    "required": ["targetLabel"],
    "properties": {
        "sourceLabels": {"type": "array", "items": {"type": "string"}},
        "targetLabel": {"type": "string"},
        "regex": {"type": "string"},
        "replacement": {"type": "string"},
        "action": {"enum": ["replace", "keep", "drop"]},
    },
}
POD_MONITOR = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PodMonitor"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["selector", "podMetricsEndpoints"],
            "properties": {
                "selector": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"matchLabels": _LABELS, "matchExpressions": {"type": "array"}},
                },
                "podTargetLabels": {"type": "array", "items": {"type": "string"}},
                "podMetricsEndpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["port"],
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string"},
                            "interval": {"type": "string", "pattern": "^[0-9]+[smh]$"},
                            "relabelings": {"type": "array", "items": _RELABELING},
                        },
                    },
                },
            },
        },
    },
}
"""Of the Prometheus operator's PodMonitor, the fields that k8s/ uses."""

METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},
        "namespace": {"type": "string"},
        "labels": _LABELS,
        "annotations": _LABELS,
    },
}
"""KubeRay's schemas leave metadata open; the length is what leaves room for what KubeRay appends."""


def schemas_folder() -> Path | None:
    """KubeRay's schemas: in `$VZ_RAY_CRDS`, or `shared/crds` here or beside this folder; else none.

    They are `RayJob.v1.schema.json` and so on: the `openAPIV3Schema` of a resource definition, each of its
    objects with `additionalProperties: false`.
    """
    given = os.environ.get("VZ_RAY_CRDS")
    places = [Path(given)] if given else [ROOT / "shared" / "crds", ROOT.parent / "shared" / "crds"]
    return next((place for place in places if (place / "RayJob.v1.schema.json").is_file()), None)


def schema_errors(manifest: Manifest) -> Iterator[str]:
    """What the schema of its kind has against a manifest; each begins with the place."""
    group = str(manifest.get("apiVersion"))
    if group.startswith("ray.io/"):
        yield from _custom(manifest)
    elif group.startswith("monitoring.coreos.com/"):
        yield from _against(POD_MONITOR, manifest)
    else:
        yield from _core(manifest)


def with_defaults(schema: Manifest, value: Any) -> Any:
    """A copy of `value` with the schema's defaults where it says nothing, as the API server stores it.

    Example: `{"properties": {"a": {"default": 1}}}`, `{}` -> `{"a": 1}`
    """
    if isinstance(value, list):
        return [with_defaults(schema.get("items") or {}, item) for item in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, below in (schema.get("properties") or {}).items():
        if name not in filled and "default" in below:
            filled[name] = deepcopy(below["default"])
        if name in filled:
            filled[name] = with_defaults(below, filled[name])
    return filled


def _custom(manifest: Manifest) -> Iterator[str]:
    folder = schemas_folder()
    if folder is None:
        return
    kind, version = manifest.get("kind"), str(manifest.get("apiVersion")).partition("/")[2]
    path = folder / f"{kind}.{version}.schema.json"
    if not path.is_file():
        yield (
            f"KubeRay has no {kind} in {manifest.get('apiVersion')}; use RayJob, RayCluster or RayService of "
            "ray.io/v1"
        )
        return
    schema = _read(path)
    yield from _against(schema, with_defaults(schema, manifest))
    yield from _against(METADATA, manifest.get("metadata"), "metadata")


@cache
def _read(path: Path) -> Manifest:
    return dict(json.loads(path.read_text()))


def _against(schema: Manifest, value: Any, prefix: str = "") -> Iterator[str]:
    for error in jsonschema.Draft7Validator(schema).iter_errors(value):
        place = ".".join([prefix, *map(str, error.absolute_path)]).strip(".")
        yield f"{place or 'the object'}: {error.message[:300]}"


def _core(manifest: Manifest) -> Iterator[str]:
    # Imported here: its schemas are large, and rules alone do not need them.
    import kubernetes_validate

    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path)) or 'the object'}: {error.message[:300]}"
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        yield (
            f"Kubernetes {KUBERNETES} has no {manifest.get('kind')} in {manifest.get('apiVersion')} ({error})"
        )
