"""Helpers for clients of OpenAI-compatible endpoints: API key and Retry-After."""

from __future__ import annotations

import os
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from vz_ray.utils.errors import UserError

_NO_KEY = "none"
"""Placeholder for servers without keys; the client library requires a value."""


def api_key_from_env(env_var: str, client: str, config_key: str, environment: str = "the environment") -> str:
    """Return the API key in an environment variable.

    Args:
        env_var: Name of the variable; empty if the server needs no key.
        client: Component that needs the key, for the error.
        config_key: Config key that names the variable, for the error.
        environment: Process whose environment is read, for the error.

    Raises:
        UserError: The variable is not set.
    """
    if not env_var:
        return _NO_KEY
    key = os.environ.get(env_var, "")
    if not key:
        raise UserError(
            f"{client} needs an API key: set {env_var} in {environment}, or leave {config_key} empty for a "
            "server without keys"
        )
    return key


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds in a Retry-After header. A date is compared with the server's own clock."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        retry_at, server_time = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (retry_at - server_time).total_seconds())
    except (ValueError, TypeError):
        return 0.0
