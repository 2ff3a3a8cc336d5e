"""Changed copies of a config, and their notation as overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

C = TypeVar("C")


def with_values(section: C, values: Mapping[str, object]) -> C:
    """Return a validated copy of a config or section with all dotted keys set at once.

    Raises:
        ValueError: The new values are invalid together.
    """
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        name, _, subkey = key.partition(".")
        if subkey:
            nested.setdefault(name, {})[subkey] = value
        else:
            changes[name] = value
    changes |= {name: with_values(getattr(section, name), inner) for name, inner in nested.items()}
    return replace(section, **changes)  # type: ignore[type-var]


def format_setting(key: str, value: object) -> str:
    """Return `key=value` as written on the command line."""
    if value is None:
        return f"{key}=null"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
