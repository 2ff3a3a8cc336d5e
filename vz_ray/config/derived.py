"""Config fields that follow another key: they have no key of their own in YAML.

A section declares such a field with `derived` or `timeout`. The config of a command calls
`set_derived_values` in `__post_init__`, and the section then holds the value of the key that it follows.
A section that is built alone, for example in a test, holds the default.
"""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass, replace
from typing import Any

from vz_ray.config.timeouts import TimeoutsConfig

SOURCE = "source"
"""Metadata key: attribute path on the command's config that holds the value."""
FOLLOWS = "follows"
"""Metadata key: the config key to set instead."""


def derived(default: Any, source: str, follows: str = "") -> Any:
    """Field that takes its value from `source`, an attribute path on the command's config.

    Args:
        default: Value of a section that is built without a command's config.
        source: For example `episode.max_context`.
        follows: Config key to set instead; default `source`.
    """
    # OmegaConf skips such a field: a file or an override cannot set it.
    metadata = {"omegaconf_ignore": True, SOURCE: source, FOLLOWS: follows or source}
    return field(default=default, metadata=metadata)


def timeout(key: str) -> Any:
    """Field that takes its value from the `timeouts` section."""
    return derived(getattr(TimeoutsConfig, key), f"timeouts.{key}")


def set_derived_values(root: Any) -> None:
    """Set every derived field in the sections of `root`; sections are replaced, not changed in place."""
    for section in fields(root):
        value = getattr(root, section.name)
        if is_dataclass(value):
            setattr(root, section.name, _with_derived_values(value, root))


def _with_derived_values(section: Any, root: Any) -> Any:
    changes = {}
    for item in fields(section):
        value = getattr(section, item.name)
        if SOURCE in item.metadata:
            new_value = _lookup(root, item.metadata[SOURCE], value)
        elif is_dataclass(value):
            new_value = _with_derived_values(value, root)
        else:
            continue
        if new_value is not value:
            changes[item.name] = new_value
    return replace(section, **changes) if changes else section


def _lookup(root: Any, path: str, default: Any) -> Any:
    """Value at an attribute path; `default` if `root` has no such attribute."""
    for name in path.split("."):
        if not hasattr(root, name):
            return default
        root = getattr(root, name)
    return root
