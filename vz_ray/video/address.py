"""Connections to public addresses only, to the very address that was looked at.

A host name is resolved here and nowhere else, so that it cannot name a public
address when it is checked and a private one when it is connected to.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterable

import httpcore

from vz_ray.video.errors import SourceRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


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
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def vetted(host: str, port: int, private_hosts: Collection[str] = ()) -> list[str]:
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
                raise SourceRefused(
                    f"{host} has the address {address}, which is not public; if videos are meant to come "
                    "from there, add the host to clips.private_hosts",
                    "the video's address cannot be opened",
                )
    return addresses


class VettedBackend(httpcore.NetworkBackend):
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
            addresses = vetted(host, port, self._private_hosts)
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
        raise SourceRefused(f"{path}: a socket, not a host", "the video's address cannot be opened")
