"""What every client of an OpenAI-compatible endpoint needs: a key, and how long a busy server has it wait."""

from __future__ import annotations

import os
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from vz_ray.utils.errors import UserError

_NO_KEY = "none"
"""Sent to servers that need no key, since the client insists on one."""


def api_key_from_env(env_var: str, client: str, config_key: str, environment: str = "the environment") -> str:
    """The key that an environment variable holds.

    Args:
        env_var: Its name; empty for a server that needs none.
        client: Needs it, for the message.
        config_key: Names the variable in the configuration.
        environment: Whose environment is looked into, for the message.

    Raises:
        UserError: It is not set.
    """
    if not env_var:
        return _NO_KEY
    key = os.environ.get(env_var, "")
    if not key:
        raise UserError(
            f"{client} needs a key: set {env_var} in {environment}, or leave {config_key} empty for a server that needs "
            "none"
        )
    return key


def retry_after_s(headers: Mapping[str, str]) -> float:
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
