"""Free ports."""

from __future__ import annotations

import socket

import pytest

from vz_ray.utils import ports
from vz_ray.utils.ports import find_free_port


def test_free_port_is_outside_of_the_ports_of_outgoing_connections() -> None:
    found = [find_free_port("127.0.0.1") for _ in range(20)]
    assert len(set(found)) > 15
    assert all(20_000 <= port < 30_000 for port in found)


def test_used_ports_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", find_free_port("127.0.0.1")))
        used.listen()
        port = used.getsockname()[1]
        monkeypatch.setattr(ports, "_PORTS", range(port, port + 1))
        monkeypatch.setattr(ports, "_MAX_ATTEMPTS", 1)
        assert find_free_port("127.0.0.1") != port
