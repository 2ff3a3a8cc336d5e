"""From a folder with a kustomization.yaml to manifests.

Two ways that must agree: the real Kustomize (`kustomize build`, or `kubectl kustomize`) where installed, and
a small one that knows the fields below and refuses every other.

| field | what of it |
|---|---|
| `resources`, `components` | files and folders |
| `namespace` | of every object that has one, and the name of the Namespace |
| `images` | `name`, `newName`, `newTag`, in `containers` and `initContainers` wherever they are |
| `patches` | merge patches and JSON patches, `path` or `patch`, `target` by `kind` and `name` |
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests.patches import apply, merge
from vz_ray.utils.errors import UserError

Manifest = dict[str, Any]

FIELDS = ("apiVersion", "kind", "namespace", "resources", "components", "images", "patches")
CUSTOM = ("ray.io/", "monitoring.coreos.com/")
"""API groups of custom resources, in whose merge patches lists replace."""
CLUSTER_WIDE = (
    "Namespace",
    "ClusterRole",
    "ClusterRoleBinding",
    "PersistentVolume",
    "PriorityClass",
    "StorageClass",
    "CustomResourceDefinition",
)
REAL_S = 60.0
"""How long the real Kustomize may take."""


def render(folder: Path | str, real: list[str] | None = None) -> list[Manifest]:
    """The manifests of a folder.

    Args:
        folder: It has a kustomization.yaml.
        real: Command of the real Kustomize, of `installed()`; without it, this module's own.

    Raises:
        UserError: No kustomization, a field that is not supported, a patch that fits nothing.
    """
    return _by_command(Path(folder), real) if real else _built(Path(folder), ())


def installed() -> list[str]:
    """The command of the real Kustomize, less the folder; empty if there is none."""
    if found := shutil.which("kustomize"):
        return [found, "build"]
    if found := shutil.which("kubectl"):
        return [found, "kustomize"]
    return []


def _by_command(folder: Path, command: list[str]) -> list[Manifest]:
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, timeout=REAL_S, check=False
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)} {folder}: {done.stderr.strip() or done.stdout.strip()}")
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def _built(folder: Path, above: tuple[Path, ...]) -> list[Manifest]:
    """What a folder renders to; `above` are those whose resources it is among."""
    file = folder / "kustomization.yaml"
    if folder.resolve() in above:
        raise UserError(f"{file} includes itself, by way of {above[-1]}")
    said = _kustomization(file)
    if said["kind"] != "Kustomization":
        raise UserError(f"{file} is a {said['kind']}: it is used by `components` of others, not by itself")
    above = (*above, folder.resolve())
    manifests: list[Manifest] = []
    for name in said.get("resources") or []:
        path = folder / name
        manifests += _built(path, above) if path.is_dir() else _documents(path, folder)
    for name in said.get("components") or []:
        component = folder / name / "kustomization.yaml"
        added = _kustomization(component)
        if added["kind"] != "Component":
            raise UserError(f"{file}: {name} is a {added['kind']}, not a Component; put it under resources")
        for extra in added.get("resources") or []:
            manifests += _documents(folder / name / extra, folder / name)
        manifests = _changed(manifests, added, component)
    _unique(manifests, file)
    return _changed(manifests, said, file)


def _kustomization(file: Path) -> Manifest:
    if not file.is_file():
        raise UserError(f"{file} is missing: give a folder that has a kustomization.yaml")
    said = next(_documents(file, file.parent), {})
    if unknown := sorted(set(said) - set(FIELDS)):
        raise UserError(
            f"{file}: {', '.join(unknown)} is not supported here (known: {', '.join(FIELDS)}); "
            "correct the name, or install kustomize"
        )
    if said.get("kind") not in ("Kustomization", "Component"):
        raise UserError(f"{file}: kind is {said.get('kind')!r}; it must be Kustomization or Component")
    return said


def _documents(path: Path, root: Path) -> Iterator[Manifest]:
    """The documents of a YAML file below `root`, anchors written out."""
    if root.resolve() not in path.resolve().parents:
        raise UserError(f"{path} is not below {root}, and Kustomize reads no other files; name its folder")
    for document in _yaml(path):
        if document is not None:
            if not isinstance(document, dict):
                raise UserError(f"{path}: a manifest is a map, not a {type(document).__name__}")
            yield document


def _yaml(path: Path) -> list[Any]:
    try:
        return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(path.read_text())]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not YAML that Kubernetes takes: {' '.join(str(error).split())}"
        ) from error


def _unique(manifests: list[Manifest], file: Path) -> None:
    seen: set[tuple[str, str]] = set()
    for manifest in manifests:
        if (name := identity(manifest)) in seen:
            raise UserError(
                f"{file}: {' '.join(name)} is there twice; remove one of the resources that bring it"
            )
        seen.add(name)


def identity(manifest: Manifest) -> tuple[str, str]:
    """Kind and name, by which manifests of one namespace differ."""
    return str(manifest.get("kind")), str((manifest.get("metadata") or {}).get("name"))


def _changed(manifests: list[Manifest], said: Manifest, file: Path) -> list[Manifest]:
    for number, patch in enumerate(said.get("patches") or []):
        manifests = _patched(manifests, patch, file, f"{file}: patches[{number}]")
    if namespace := said.get("namespace"):
        for manifest in manifests:
            if manifest.get("kind") == "Namespace":
                manifest["metadata"]["name"] = namespace
            elif manifest.get("kind") not in CLUSTER_WIDE:
                manifest["metadata"]["namespace"] = namespace
    for image in said.get("images") or []:
        if unknown := set(image) - {"name", "newName", "newTag"}:
            raise UserError(
                f"{file}: images: {', '.join(sorted(unknown))} is not supported here; "
                "use name, newName and newTag, or install kustomize"
            )
        for manifest in manifests:
            _retag(manifest, image)
    return manifests


def _patched(manifests: list[Manifest], patch: Manifest, file: Path, at: str) -> list[Manifest]:
    if unknown := set(patch) - {"path", "patch", "target"}:
        raise UserError(
            f"{at}: {', '.join(sorted(unknown))} is not supported here; use path or patch, and target"
        )
    if ("path" in patch) == ("patch" in patch):
        raise UserError(f"{at}: give either path or patch")
    if "path" in patch:
        at = f"{at} ({patch['path']})"
        [body] = _yaml(file.parent / patch["path"])
    else:
        body = _inline(str(patch["patch"]), at)
    target = patch.get("target") or {}
    if unknown := set(target) - {"kind", "name"}:
        raise UserError(f"{at}: target.{sorted(unknown)[0]} is not supported here; use kind and name")
    if not target:
        if not isinstance(body, dict):
            raise UserError(f"{at}: a JSON patch needs a target with kind and name")
        target = dict(zip(("kind", "name"), map(re.escape, identity(body)), strict=True))
    fits = [manifest for manifest in manifests if _is(manifest, target)]
    if not fits:
        there = ", ".join(" ".join(identity(manifest)) for manifest in manifests)
        raise UserError(f"{at}: no object is {' '.join(target.values())}; there are {there}")
    return [_one(manifest, body, at) if manifest in fits else manifest for manifest in manifests]


def _inline(text: str, at: str) -> Any:
    """A patch within a kustomization; Kustomize reads it as JSON where it begins like a list of that."""
    try:
        return json.loads(text if text.lstrip().startswith("[") else json.dumps(yaml.safe_load(text)))
    except ValueError as error:
        raise UserError(
            f"{at}: it begins with '[' and is not JSON; write one line for each `- op`"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{at}: it is not YAML: {' '.join(str(error).split())}") from error


def _one(manifest: Manifest, body: Any, at: str) -> Manifest:
    if isinstance(body, list):
        return dict(apply(manifest, body, at=at))
    custom = str(manifest.get("apiVersion")).startswith(CUSTOM)
    return dict(merge(manifest, body, lists=custom, at=at))


def _is(manifest: Manifest, target: dict[str, str]) -> bool:
    kind, name = identity(manifest)
    return bool(re.fullmatch(target.get("kind", ".*"), kind) and re.fullmatch(target.get("name", ".*"), name))


def _retag(node: Any, image: dict[str, str]) -> None:
    """Renames an image in all lists of containers below `node`."""
    if isinstance(node, list):
        for item in node:
            _retag(item, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                for container in value:
                    _rename(container, image)
            else:
                _retag(value, image)


def _rename(container: Any, image: dict[str, str]) -> None:
    name, _, tag = (
        str(container.get("image", "")).partition(":") if isinstance(container, dict) else ("", "", "")
    )
    if name == image["name"]:
        tag = str(image.get("newTag", tag))
        container["image"] = image.get("newName", name) + (f":{tag}" if tag else "")
