"""Counters of the decode pool and of its clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from vz_ray.video.clip_reader import ReaderStats


@dataclass(slots=True)
class RequestCounters:
    """Attempts and coalesced requests of one client, since its creation."""

    retried: int = 0
    timed_out: int = 0
    lost: int = 0
    killed: int = 0
    coalesced: int = 0


@dataclass(frozen=True, slots=True)
class DecodeClientStats:
    """State and counters of one client of the pool. Stats of several clients can be added.

    Attributes:
        in_flight: Requests at a decoder now.
        waiting: Requests in the admission queue now.
        retried: Attempts after the first.
        timed_out: Attempts that timed out.
        lost: Attempts that ended with the death of the decoder.
        killed: Stuck decoders that this client killed.
        quarantined: Videos in quarantine.
    """

    in_flight: int = 0
    waiting: int = 0
    retried: int = 0
    timed_out: int = 0
    lost: int = 0
    killed: int = 0
    quarantined: int = 0

    def __add__(self, other: DecodeClientStats) -> DecodeClientStats:
        return DecodeClientStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class DecodePoolStats:
    """Counters of the decoders and of the client that collects them.

    Attributes:
        reader: Sum over the decoders, each since its last restart.
        unresponsive: Names of decoders that did not reply.
        retried: Attempts of this client after the first.
        timed_out: Attempts of this client that timed out.
        lost: Attempts of this client that ended with the death of the decoder.
        killed: Stuck decoders that this client killed.
        num_decoders: Decoders registered with this client.
        coalesced: Requests of this client that shared the result of an identical one in flight.
        in_flight_bytes: Upper bound on the frame bytes that this client has requested and not received.
        peak_in_flight_bytes: Maximum of `in_flight_bytes` so far.
        quarantined: Quarantined videos of this client, with the reason.
    """

    reader: ReaderStats
    unresponsive: tuple[str, ...]
    retried: int
    timed_out: int
    lost: int
    killed: int
    num_decoders: int = 0
    coalesced: int = 0
    in_flight_bytes: int = 0
    peak_in_flight_bytes: int = 0
    quarantined: Mapping[str, str] = field(default_factory=dict)
