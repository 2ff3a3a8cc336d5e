"""The decode actors as one handle knows them: who serves, how much it has asked of each, whom to ask next."""

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

_ANSWER_S = 10.0
_FRESH_S = 5 * REPORT_INTERVAL_S
"""A roster older than this may name actors that have ended."""


class DecoderRouter:
    """Actors by slot; where a keeper is given, they come and go, and it is told of the load.

    Args:
        actors: Those that serve now.
        fixed: Those among them that do not come and go.
        keeper: The `DecodeAutoscaler`, or None where the number of actors is fixed.
        spill: A video's own actor is passed over when it is this many requests behind the idlest.

    Attributes:
        actors: Those that serve, as last heard.
        known_actors: All that were ever heard of, so that a request under way can end as it may.
        in_flight: Requests of this handle by slot.
    """

    def __init__(
        self, actors: Mapping[int, Any], fixed: Mapping[int, Any], keeper: Any | None, spill: int
    ) -> None:
        self.actors, self.known_actors, self._fixed = dict(actors), dict(actors), dict(fixed)
        self.in_flight: Counter[int] = Counter()
        self._keeper, self._spill = keeper, spill
        self._handle = uuid.uuid4().hex
        self._heard_s = -_FRESH_S
        self._telling: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None

    def __reduce__(self) -> tuple[type[DecoderRouter], tuple[Any, ...]]:
        return (DecoderRouter, (self.actors, self._fixed, self._keeper, self._spill))

    async def refresh(self) -> None:
        """Hears of changes if it has not for a while, and goes on doing so while requests are in flight."""
        if self._keeper is None:
            return
        if time.monotonic() - self._heard_s >= _FRESH_S:
            await self.sync()
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._keep_telling())

    async def sync(self) -> None:
        """Tells the keeper of the load and hears who serves; who asks meanwhile hears it too."""
        if self._keeper is None:
            return
        if self._hearing is None or self._hearing.done():
            self._hearing = asyncio.create_task(self._tell(self._keeper))
        await asyncio.shield(self._hearing)

    def reset_load(self) -> None:
        """Another event loop begins: what was in flight in the last one will not be answered."""
        self.in_flight.clear()
        self._telling = self._hearing = None

    def route(self, uri: str, tried: Collection[int]) -> int:
        """The video's own actor (rendezvous hashing), or the idlest where that one is behind."""
        order = sorted(self.actors, key=lambda slot: _weight(uri, slot))
        left = [slot for slot in order if slot not in tried] or order
        idlest = min(left, key=lambda slot: self.in_flight[slot])
        behind = self.in_flight[left[0]] - self.in_flight[idlest] >= self._spill
        return idlest if behind else left[0]

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            loaded = self.in_flight.total() > 0
            await self.sync()
            if not loaded:
                return

    async def _tell(self, keeper: Any) -> None:
        try:
            answer = keeper.report.remote(self._handle, dict(+self.in_flight))
            self.actors = await with_timeout(
                answer, _ANSWER_S, target="the clip pool's keeper", operation="a report"
            )
            self.known_actors |= self.actors
        except RayActorError as died:
            log.warning("the decode actors that came with the load have ended with their keeper: %s", died)
            self.actors = dict(self._fixed)
        except StepTimeout as overdue:
            log.warning("going on with the decode actors known so far: %s", overdue)
        self._heard_s = time.monotonic()


def decoder_name(slot: int) -> str:
    """What an actor is called in errors and logs."""
    return f"decoder-{slot}"


def _weight(uri: str, slot: int) -> bytes:
    return hashlib.blake2b(f"{slot}/{uri}".encode(), digest_size=8).digest()
