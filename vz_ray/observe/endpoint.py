"""What every client of an OpenAI-compatible endpoint needs: a key, and how long a busy server has it wait."""

from __future__ import annotations

import os
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from vz_ray.observe.errors import UserError

_NO_KEY = "none"
"""Sent to servers that need no key, since the client insists on one."""


def key_from(variable: str, who: str, setting: str, where: str = "the environment") -> str:
    """The key that an environment variable holds.

    Args:
        variable: Its name; empty for a server that needs none.
        who: Needs it, for the message.
        setting: Names the variable in the configuration.
        where: Whose environment is looked into, for the message.

    Raises:
        UserError: It is not set.
    """
    if not variable:
        return _NO_KEY
    key = os.environ.get(variable, "")
    if not key:
        raise UserError(
            f"{who} needs a key: set {variable} in {where}, or leave {setting} empty for a server that needs "
            "none"
        )
    return key


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: a number, or a date compared with the server's own clock."""
    said = headers.get("retry-after", "")
    try:
        return max(0.0, float(said or 0))
    except ValueError:
        pass
    try:
        then, now = parsedate_to_datetime(said), parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError):
        return 0.0
