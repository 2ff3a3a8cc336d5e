"""Free TCP ports, and the check of a connection."""

from __future__ import annotations

import contextlib
import random
import socket

from vz_ray.utils.errors import UserError

CONNECT_TIMEOUT_S = 10.0
"""Timeout of a TCP connection to an existing cluster."""


_PORTS = range(20_000, 30_000)
"""Above the ports of Ray's workers, and below those of Kubernetes services and outgoing connections, which would take a
free port before it is used."""
_MAX_ATTEMPTS = 100


def find_free_port(host: str = "") -> int:
    """Return a port of `host` that is currently free; default: of all IPv4 addresses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Any port is better than none.
    for port in (*random.SystemRandom().sample(_PORTS, _MAX_ATTEMPTS), 0):
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise UserError(f"no TCP port of {host or 'this machine'} is free; end processes that listen, see `ss -ltn`")


def check_ray_connection(address: str, fix: str) -> None:
    """Check that `host:port` accepts connections, because Ray would retry for a minute.

    Args:
        address: Address of a Ray cluster; another form than `host:port`, such as `auto`, is not checked.
        fix: End of the error message.

    Raises:
        UserError: The connection failed.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        return  # `auto`: Ray fails at once without a cluster
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot join Ray at {address}: connection failed ({reason}); {fix}") from error
