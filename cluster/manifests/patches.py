"""The two kinds of patches that Kustomize knows, for what k8s/ needs of them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from vz_ray.utils.errors import UserError


def merge(target: Any, patch: Any, *, lists: bool, at: str) -> Any:
    """A strategic merge: maps are merged, null deletes, everything else is replaced.

    Args:
        target: What is patched; left as it is.
        patch: What is laid over it.
        lists: Whether lists are replaced, as they are in custom resources. Those of Kubernetes' own kinds are
            merged by keys that their schemas name, which is not done here.
        at: Where the patch stands, for errors.

    Raises:
        UserError: A list in a patch of one of Kubernetes' own kinds, or a directive.

    Example: `{"a": 1, "b": {"c": 2, "d": 3}}`, `{"b": {"c": 4, "d": null}}` -> `{"a": 1, "b": {"c": 4}}`
    """
    if isinstance(patch, list) and not lists:
        raise UserError(
            f"{at}: this patch holds a list, which Kustomize merges by keys of the kind's schema; "
            "write it as a JSON patch (op, path, value), or install kustomize"
        )
    if not isinstance(patch, dict):
        return deepcopy(patch)
    if directive := next((key for key in patch if str(key).startswith("$")), None):
        raise UserError(f"{at}: {directive} is not supported here; write a JSON patch, or install kustomize")
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value, lists=lists, at=f"{at}: {key}")
    return merged


def apply(target: Any, operations: list[dict[str, Any]], *, at: str) -> Any:
    """A JSON patch: `add`, `remove`, `replace` and `test`, each in turn.

    Args:
        target: What is patched; left as it is.
        operations: As in RFC 6902.
        at: Where the patch stands, for errors.

    Raises:
        UserError: A path that does not exist, a test that fails, another operation.
    """
    patched = deepcopy(target)
    for operation in operations:
        op, path = operation.get("op"), str(operation.get("path"))
        extra = set(operation) - {"op", "path", "value"}
        if (
            op not in ("add", "remove", "replace", "test")
            or extra
            or ("value" in operation) == (op == "remove")
        ):
            raise UserError(
                f"{at}: {operation} is not an operation: give op (add, remove, replace or test), "
                "path, and value unless it removes"
            )
        _operate(patched, op, path, deepcopy(operation.get("value")), at)
    return patched


def _operate(document: Any, op: str, path: str, value: Any, at: str) -> None:
    parent, key = _parent(document, path, at)
    there = key in parent if isinstance(parent, dict) else key < len(parent)
    if op != "add" and not there:
        raise UserError(f"{at}: nothing is at {path} to {op}; look at `python -m cluster.manifests render`")
    if op == "test":
        if parent[key] != value:
            raise UserError(f"{at}: {path} is {parent[key]!r}, and the patch was written for {value!r}")
    elif op == "remove":
        del parent[key]
    elif op == "add" and isinstance(parent, list):
        parent.insert(key, value)
    else:
        parent[key] = value


def _parent(document: Any, path: str, at: str) -> tuple[Any, Any]:
    """The map or list that holds what a path names, and its key there."""
    if not path.startswith("/"):
        raise UserError(f"{at}: path {path!r} must begin with '/'")
    *steps, last = (step.replace("~1", "/").replace("~0", "~") for step in path[1:].split("/"))
    node = document
    for step in steps:
        try:
            node = node[int(step)] if isinstance(node, list) else node[step]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise UserError(
                f"{at}: {path} has no {step!r}; look at `python -m cluster.manifests render`"
            ) from error
    if isinstance(node, list):
        if last == "-":
            return node, len(node)
        if not last.isdigit() or int(last) > len(node):
            raise UserError(f"{at}: {path}: {last!r} is no place in a list of {len(node)}")
        return node, int(last)
    if not isinstance(node, dict):
        raise UserError(f"{at}: {path}: there is a {type(node).__name__} where a map or list is needed")
    return node, last
