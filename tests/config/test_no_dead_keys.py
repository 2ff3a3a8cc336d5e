"""A config key that nothing reads is a promise that nothing keeps."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import vz_ray
import vz_ray.config

ROOT = Path(vz_ray.__file__).parent


def config_keys() -> dict[str, str]:
    """`Class.key -> key` for every dataclass in vz_ray/config."""
    keys = {}
    for module in pkgutil.iter_modules(vz_ray.config.__path__):
        loaded = importlib.import_module(f"vz_ray.config.{module.name}")
        for name, value in vars(loaded).items():
            if is_dataclass(value) and value.__module__ == loaded.__name__ and not name.startswith("_"):
                keys |= {f"{module.name}.{name}.{field.name}": field.name for field in fields(value)}
    return keys


def reads(tree: ast.AST) -> set[str]:
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def names_read() -> set[str]:
    """Attributes read outside vz_ray/config, or by a property or method in it; checks do not count."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.parent != ROOT / "config":
            found |= reads(tree)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "__post_init__":
                found |= reads(node)
    return found


def test_every_config_key_is_read_somewhere():
    read = names_read()
    unread = [where for where, key in config_keys().items() if key not in read]
    assert not unread, f"config keys that nothing reads: {', '.join(unread)}"
