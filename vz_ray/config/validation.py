"""Checks of config values: an error carries the key, so that the loader can name the file and line."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


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


def check_min(section: object, minimum: float, *keys: str) -> None:
    """Check that each value is at least `minimum`."""
    for key in keys:
        value = getattr(section, key)
        if not (math.isfinite(value) and value >= minimum):
            raise InvalidValueError(key, f"is {value}; it must be at least {minimum:g}")


def check_not_negative(section: object, *keys: str) -> None:
    """Check that each value is finite and 0 or more."""
    for key in keys:
        value = getattr(section, key)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidValueError(key, f"is {value}; it must be finite and not negative")


def check_positive(section: object, *keys: str) -> None:
    """Check that each value is finite and above 0."""
    for key in keys:
        value = getattr(section, key)
        if not (math.isfinite(value) and value > 0):
            raise InvalidValueError(key, f"is {value}; it must be finite and above 0")


def check_fraction(section: object, *keys: str) -> None:
    """Check that each value lies between 0 and 1, both included."""
    for key in keys:
        value = getattr(section, key)
        if not 0 <= value <= 1:
            raise InvalidValueError(key, f"is {value}; it must be between 0 and 1")


def check_choice(section: object, key: str, choices: Collection[object]) -> None:
    """Check that the value is one of `choices`."""
    value = getattr(section, key)
    if value not in choices:
        raise InvalidValueError(key, f"is {value!r}; it must be one of {', '.join(map(str, choices))}")


def check_endpoint(section: Any, *reserved: str) -> None:
    """Check the keys of a chat endpoint. `reserved` are further request parameters that the client sets."""
    if section.model and not section.base_url.startswith(("http://", "https://")):
        raise InvalidValueError(
            "base_url",
            f"is {section.base_url!r}; with model {section.model!r} it must be the endpoint's address, for example "
            "http://host:8000/v1",
            "model",
        )
    for name in ("model", "messages", "stream", "n", *reserved):
        if name in section.parameters:
            raise InvalidValueError("parameters", f"has {name!r}, which is reserved; remove it")
    check_min(section, 1, "max_concurrency", "max_attempts")
    check_positive(section, "backoff_s")
