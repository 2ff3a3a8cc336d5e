"""Connections to public addresses only, to the very address that was looked at.

A host name is resolved here and nowhere else, so that it cannot name a public
address when it is checked and a private one when it is connected to.
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
"""All of IPv6 that is assigned to hosts of the Internet."""
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure's machines get their secrets from there
            "192.0.0.0/24",  # protocol assignments; one cloud's metadata service
            "192.88.99.0/24",  # relays to IPv6, given up (RFC 7526)
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)
"""Refused besides what Python calls not global, which differs between its versions."""
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def is_ip_literal(host: str) -> bool:
    """Whether a host is not a name but an address, in any of the ways of writing one.

    The rule of URLs in browsers: the last label is a number, decimal, octal or hexadecimal.

    Example: `127.0.0.1`, `127.1`, `2130706433`, `0x7f.1`, `017700000001`, `::1`.
    """
    return ":" in host or bool(_NUMBER.fullmatch(host.lower().removesuffix(".").rpartition(".")[2]))


def is_public_literal(host: str) -> bool:
    """Whether a host is a public address, written in the usual way; without looking anything up."""
    try:
        return is_public(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_public(address: Address) -> bool:
    """Whether an address is one of the Internet's, also where it wraps an IPv4 address."""
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
    """Every address of `host`, numeric, all of them public or `host` one of `private_hosts`.

    Raises:
        SourceRefused: One of them is not public.
        OSError: The name cannot be resolved.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if host not in private_hosts:
        for address in addresses:
            if not is_public(ipaddress.ip_address(address.partition("%")[0])):
                raise SourceNotAllowedError(
                    f"{host} has the address {address}, which is not public; if videos are meant to come "
                    "from there, add the host to clips.allowed_private_hosts",
                    "the video's address cannot be opened",
                )
    return addresses


class PublicNetworkBackend(httpcore.NetworkBackend):
    """httpcore's network, which every connection goes through, redirected ones and plain addresses too."""

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
        raise SourceNotAllowedError(f"{path}: a socket, not a host", "the video's address cannot be opened")
