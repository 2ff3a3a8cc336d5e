"""Free TCP ports."""

from __future__ import annotations

import socket


def find_free_port(host: str = "") -> int:
    """Return a port of `host` that is currently free; default: of all IPv4 addresses."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
