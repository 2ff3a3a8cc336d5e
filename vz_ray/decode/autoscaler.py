"""Starts and ends decode actors as the load asks: one Ray actor, of which handles ask who serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from vz_ray.config.clips import ClipsConfig
from vz_ray.decode.decoder import start_decoder
from vz_ray.monitoring import logging_config
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.utils.code_fingerprint import check_same_code
from vz_ray.utils.scaling_policy import ScalingPolicy
from vz_ray.utils.timeouts import with_timeout

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
"""How often a handle with requests in flight says so."""
_TICK_S = 0.5
_FORGET_S = 10 * REPORT_INTERVAL_S
"""A handle silent for as long has gone, or has nothing in flight."""
_START_S = 600.0
"""A cluster may have to start a machine first."""


@dataclass(frozen=True, slots=True)
class _LoadReport:
    at_s: float
    in_flight: Mapping[int, int]


@ray.remote(num_cpus=0, max_restarts=-1)
class DecodeAutoscaler:
    """Knows every decode actor by its slot.

    The first ones are given to it and stay; those that it starts are its own and end with it, so a
    keeper that died comes back to a pool of the first ones alone, and grows it anew.
    """

    def __init__(
        self, driver: Mapping[str, str], config: ClipsConfig, actors: Mapping[int, Any], badge: RunIdentity
    ) -> None:
        logging_config.configure_actor_logging("decode-autoscaler", badge)
        check_same_code(driver, "the clip pool's keeper", ray.util.get_node_ip_address())
        self._driver, self._config, self._badge = driver, config, badge
        self._scaler = ScalingPolicy(
            min_count=config.num_actors,
            max_count=config.actor_limit,
            max_load_each=config.upscale_queue_length,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
        )
        self._serving, self._fixed = dict(actors), frozenset(actors)
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._leaving: dict[int, tuple[float, Any]] = {}
        self._reports: dict[str, _LoadReport] = {}
        self._ticking: asyncio.Task[None] | None = None

    async def report(self, handle: str, in_flight: Mapping[int, int]) -> dict[int, Any]:
        """Takes down a handle's requests by slot; returns the actors that serve."""
        self._reports[handle] = _LoadReport(time.monotonic(), dict(in_flight))
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())
        return dict(self._serving)

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            self._reports = {h: r for h, r in self._reports.items() if now - r.at_s < _FORGET_S}
            requests = sum(sum(report.in_flight.values()) for report in self._reports.values())
            actors = len(self._serving) + len(self._starting)
            target = self._scaler.target_count(now, actors, requests)
            for _ in range(target - actors):
                self._start()
            for _ in range(actors - target):
                self._retire(now)
            self._end_the_retired(now)
            await asyncio.sleep(_TICK_S)

    def _start(self) -> None:
        taken = {*self._serving, *self._starting, *self._leaving}
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        log.info("starting decoder-%d: requests queue up", slot)
        self._starting[slot] = asyncio.create_task(self._join(slot))

    async def _join(self, slot: int) -> None:
        """Waits until the actor answers; only then does it serve."""
        who = f"decoder-{slot}"
        actor = start_decoder(who, self._driver, self._config, self._badge)
        try:
            await with_timeout(actor.busy_s.remote(), _START_S, target=who, operation="its start")
            self._serving[slot] = actor
        except Exception as error:
            why = error.cause if isinstance(error, RayTaskError) else error
            log.warning("%s did not start: %s", who, why)
            ray.kill(actor)
        finally:
            del self._starting[slot]

    def _retire(self, now: float) -> None:
        slot = max((slot for slot in self._serving if slot not in self._fixed), default=None)
        if slot is not None:
            log.info("decoder-%d is not needed any more", slot)
            self._leaving[slot] = (now, self._serving.pop(slot))

    def _end_the_retired(self, now: float) -> None:
        """Ends actors that left, once every handle that knew them has heard of it and none waits for them."""
        for slot, (since, actor) in list(self._leaving.items()):
            reports = self._reports.values()
            heard = now - since >= _FORGET_S or all(report.at_s > since for report in reports)
            if heard and not any(report.in_flight.get(slot) for report in reports):
                ray.kill(actor)
                del self._leaving[slot]
