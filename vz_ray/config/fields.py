"""Fields of config sections: allowed values, and values that follow another key.

A section derives from `Section` and declares the rule of a field next to its default: `number`, `choice`,
`derived`. An error carries the key, so that the loader can name the file and line.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

SOURCE = "source"
"""Metadata key: attribute path on the command's config that holds the value."""
FOLLOWS = "follows"
"""Metadata key: the config key to set instead."""
_CHOICES, _RANGE = "choices", "range"


class InvalidValueError(ValueError):
    """A value of a section breaks a rule.

    Args:
        key: Key of the value, relative to the section that raises.
        message: Follows the key: the value, the rule, the fix.
        related: Other keys that the rule involves, also relative.

    Example:
        InvalidValueError("max_steps", "is 0; it must be at least 1")
    """

    def __init__(self, key: str, message: str, *related: str) -> None:
        super().__init__(f"{key} {message}")
        self.key, self.message, self.related = key, message, related


@dataclass(frozen=True, slots=True)
class NumberRange:
    """Allowed range of a finite number: `minimum` and `maximum` are allowed, `above` and `below` are not."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    reason: str = ""
    """Follows the rule in an error."""

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"between {self.minimum:g} and {self.maximum:g}{self.reason}"
        if self == NumberRange(minimum=0):
            return "finite and not negative"
        if self == NumberRange(above=0):
            return "finite and above 0"
        limits = (("at least", self.minimum), ("above", self.above), ("at most", self.maximum), ("below", self.below))
        return " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None) + self.reason


def number(
    default: float | None,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    reason: str = "",
) -> Any:
    """Field for a number in a range; None is allowed if its type allows it."""
    return field(default=default, metadata={_RANGE: NumberRange(minimum, above, maximum, below, reason)})


def choice(default: object, *others: object) -> Any:
    """Field for one of several values."""
    return field(default=default, metadata={_CHOICES: (default, *others)})


def derived(default: Any, source: str, follows: str = "") -> Any:
    """Field without a key in YAML: it takes its value from another key.

    `set_derived_values` sets it. A section that is built alone, for example in a test, holds the default.

    Args:
        default: Value of a section that is built without a command's config.
        source: Attribute path on the command's config, for example `episode.max_context`.
        follows: Config key to set instead; default `source`.
    """
    # OmegaConf skips such a field: a file or an override cannot set it.
    metadata = {"omegaconf_ignore": True, SOURCE: source, FOLLOWS: follows or source}
    return field(default=default, metadata=metadata)


@dataclass
class Section:
    """Base of config sections; checks the fields that are declared with `number` or `choice`."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if _RANGE in item.metadata and value is not None:
                check_range(self, item.name, item.metadata[_RANGE])
            elif _CHOICES in item.metadata:
                choices = item.metadata[_CHOICES]
                # YAML reads unquoted `on` and `off` as true and false.
                name = {"True": "on", "False": "off"}.get(str(value))
                if name in choices:
                    setattr(self, item.name, name)
                else:
                    check_choice(item.name, value, choices)


def check_range(section: object, key: str, allowed: NumberRange) -> None:
    """Check that a value of a section is in `allowed`."""
    value = getattr(section, key)
    if value not in allowed:
        raise InvalidValueError(key, f"is {value}; it must be {allowed}")


def check_choice(key: str, value: object, choices: Collection[object]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise InvalidValueError(key, f"is {value!r}; it must be one of {', '.join(map(str, choices))}")


def check_at_least(section: object, key: str, other: str, hint: str = "") -> None:
    """Check that the value of `key` is at least that of `other`, another key of the section."""
    value, limit = getattr(section, key), getattr(section, other)
    if value < limit:
        raise InvalidValueError(key, f"is {value}; it must be at least {other} ({limit}){hint}", other)


def check_at_most(section: object, key: str, other: str) -> None:
    """Check that the value of `key` is at most that of `other`, another key of the section."""
    value, limit = getattr(section, key), getattr(section, other)
    if value > limit:
        raise InvalidValueError(key, f"is {value}; it must be at most {other} ({limit})", other)


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
    """Value at an attribute path; `default` if `root` has no such attribute or the value is None."""
    for name in path.split("."):
        if not hasattr(root, name):
            return default
        root = getattr(root, name)
    return default if root is None else root
