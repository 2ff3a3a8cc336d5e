"""Routing table of one client: registered decoders, their load, and the decoder for a video."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from ray.exceptions import RayActorError

from vz_ray.decode.autoscaler import REPORT_INTERVAL_S
from vz_ray.utils.timeouts import StepTimeout, with_timeout

log = logging.getLogger(__name__)

_SYNC_TIMEOUT_S = 10.0
_MAX_AGE_S = 5 * REPORT_INTERVAL_S
"""Maximum age of the table; an older one may contain decoders that were stopped."""


class DecoderRouter:
    """Decoder actors by slot, kept up to date by the autoscaler if there is one.

    Args:
        fixed: The subset that the autoscaler never stops.
        autoscaler: The `DecodeAutoscaler` actor; None for a fixed number of decoders.
        max_imbalance: Load difference to the least loaded decoder at which a video's preferred
            decoder is skipped, requests.

    Attributes:
        actors: Registered decoders, as of the last sync.
        known_actors: Every decoder registered so far; requests to a removed one may still finish.
        in_flight: Requests of this client by slot.
    """

    def __init__(
        self,
        actors: Mapping[int, Any],
        fixed: Mapping[int, Any],
        autoscaler: Any | None,
        max_imbalance: int,
    ) -> None:
        self.actors, self.known_actors, self._fixed = dict(actors), dict(actors), dict(fixed)
        self.in_flight: Counter[int] = Counter()
        self._autoscaler, self._max_imbalance = autoscaler, max_imbalance
        self._client_id = uuid.uuid4().hex
        self._synced_s = -_MAX_AGE_S
        self._report_task: asyncio.Task[None] | None = None
        self._sync_task: asyncio.Task[None] | None = None

    def __reduce__(self) -> tuple[type[DecoderRouter], tuple[Any, ...]]:
        return (DecoderRouter, (self.actors, self._fixed, self._autoscaler, self._max_imbalance))

    async def refresh(self) -> None:
        """Sync if the table is old, and keep syncing while requests are in flight."""
        if self._autoscaler is None:
            return
        if time.monotonic() - self._synced_s >= _MAX_AGE_S:
            await self.sync()
        if self._report_task is None or self._report_task.done():
            self._report_task = asyncio.create_task(self._report_periodically())

    async def sync(self) -> None:
        """Report the load to the autoscaler and update the table. Concurrent callers share one call."""
        if self._autoscaler is None:
            return
        if self._sync_task is None or self._sync_task.done():
            self._sync_task = asyncio.create_task(self._sync(self._autoscaler))
        await asyncio.shield(self._sync_task)

    def reset_load(self) -> None:
        """Discard the load of a previous event loop; its requests never complete."""
        self.in_flight.clear()
        self._report_task = self._sync_task = None

    def route(self, uri: str, tried: Collection[int]) -> int:
        """Return the slot for a request.

        Rendezvous hashing gives each video a preferred decoder, which has the video open. The
        least loaded decoder replaces it if the load difference reaches `max_imbalance`. Slots in
        `tried` are skipped unless all were tried.
        """
        by_preference = sorted(self.actors, key=lambda slot: _weight(uri, slot))
        candidates = [slot for slot in by_preference if slot not in tried] or by_preference
        preferred = candidates[0]
        least_loaded = min(candidates, key=lambda slot: self.in_flight[slot])
        imbalance = self.in_flight[preferred] - self.in_flight[least_loaded]
        return least_loaded if imbalance >= self._max_imbalance else preferred

    async def _report_periodically(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            loaded = self.in_flight.total() > 0
            await self.sync()
            if not loaded:
                return

    async def _sync(self, autoscaler: Any) -> None:
        try:
            self.actors = await with_timeout(
                autoscaler.report.remote(self._client_id, dict(+self.in_flight)),
                _SYNC_TIMEOUT_S,
                target="the decode autoscaler",
                operation="a load report",
            )
            self.known_actors |= self.actors
        except RayActorError as error:
            log.warning("Decode autoscaler died with the decoders that it had started: %s", error)
            self.actors = dict(self._fixed)
        except StepTimeout as timeout:
            log.warning("Keeping the current decoders: %s", timeout)
        self._synced_s = time.monotonic()


def decoder_name(slot: int) -> str:
    """Return the name of a decoder in errors and logs."""
    return f"decoder-{slot}"


def _weight(uri: str, slot: int) -> bytes:
    return hashlib.blake2b(f"{slot}/{uri}".encode(), digest_size=8).digest()
