"""Network backend that connects to public addresses only (protection against SSRF).

The backend resolves the host name, checks the addresses and connects to them. A second resolution
(DNS rebinding) cannot replace a checked address by a private one.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection, Iterable

import httpcore

from vz_ray.video.errors import SourceNotAllowedError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""IPv6 range of public hosts."""
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure metadata service
            "192.0.0.0/24",  # protocol assignments, used by a cloud metadata service
            "192.88.99.0/24",  # deprecated 6to4 relays (RFC 7526)
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)
"""Rejected in addition to `is_global`, which differs between Python versions."""
_IP_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")


def is_ip_literal(host: str) -> bool:
    """Return whether a host is an IP address in any notation, not a name.

    Browsers use the same rule: the last label is a decimal, octal or hexadecimal number.

    Example: `127.0.0.1`, `127.1`, `2130706433`, `0x7f.1`, `017700000001`, `::1`.
    """
    return ":" in host or bool(_IP_LABEL.fullmatch(host.lower().removesuffix(".").rpartition(".")[2]))


def is_public_literal(host: str) -> bool:
    """Return whether a host is a public IP address in standard notation, without DNS resolution."""
    try:
        return is_public(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_public(address: Address) -> bool:
    """Return whether an address is public. IPv6 addresses that embed IPv4 are unwrapped."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address.teredo is not None:
            inner = address.teredo[1]
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST:
            return False
    if any(address in network for network in _NOT_PUBLIC if network.version == address.version):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def resolve_public_addresses(host: str, port: int, private_hosts: Collection[str] = ()) -> list[str]:
    """Resolve `host` to numeric addresses. All must be public unless `private_hosts` contains `host`.

    Raises:
        SourceNotAllowedError: An address is not public.
        OSError: The name cannot be resolved.
    """
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    if host not in private_hosts:
        for address in addresses:
            if not is_public(ipaddress.ip_address(address.partition("%")[0])):
                raise SourceNotAllowedError(
                    f"{host} resolves to {address}, which is not public; to allow the host, add it to "
                    "clips.allowed_private_hosts"
                )
    return addresses


class PublicNetworkBackend(httpcore.NetworkBackend):
    """httpcore backend that checks the address of every connection, including redirects."""

    def __init__(self, private_hosts: Collection[str] = ()) -> None:
        self._private_hosts = private_hosts
        self._network = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        try:
            addresses = resolve_public_addresses(host, port, self._private_hosts)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {error}") from error
        for address in addresses:
            try:
                return self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.NetworkError as error:
                failure = error
        raise failure

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        raise SourceNotAllowedError(f"{path}: a Unix socket, not a host")
