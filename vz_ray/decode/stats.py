"""Counters of the decode pool and of its clients."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vz_ray.video.clip_reader import ReaderStats


@dataclass(slots=True)
class RequestCounters:
    """Attempts of one client, since its creation."""

    retried: int = 0
    timed_out: int = 0
    lost: int = 0
    killed: int = 0


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
    """Counters of the decoders.

    Attributes:
        reader: Sum over the decoders, each since its last restart.
        unresponsive: Names of decoders that did not reply.
        num_decoders: Decoders registered with the client that collects the counters.
        peak_in_flight_bytes: Maximum frame bytes that this client has requested and not received.
    """

    reader: ReaderStats
    unresponsive: tuple[str, ...]
    num_decoders: int
    peak_in_flight_bytes: int = 0
