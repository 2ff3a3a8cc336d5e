"""Autoscaler of the decode pool: one Ray actor that starts and stops decoders by load."""

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
"""Interval of the load reports of a client with requests in flight."""
_TICK_S = 0.5
_REPORT_TTL_S = 10 * REPORT_INTERVAL_S
"""A client without a report for this time has exited or is idle."""
_START_TIMEOUT_S = 600.0
"""Timeout of a decoder's start; the cluster may have to start a node first."""


@dataclass(frozen=True, slots=True)
class _LoadReport:
    time_s: float
    in_flight: Mapping[int, int]


@ray.remote(num_cpus=0, max_restarts=-1)
class DecodeAutoscaler:
    """Registry of all decoders by slot.

    The initial decoders are passed in and never stopped. Decoders that the autoscaler starts die
    with it: after a restart it begins with the initial ones and scales up again.
    """

    def __init__(
        self,
        driver: Mapping[str, str],
        config: ClipsConfig,
        actors: Mapping[int, Any],
        run_identity: RunIdentity,
    ) -> None:
        logging_config.configure_actor_logging("decode-autoscaler", run_identity)
        check_same_code(driver, "the decode autoscaler", ray.util.get_node_ip_address())
        self._driver, self._config, self._run_identity = driver, config, run_identity
        self._policy = ScalingPolicy(
            min_count=config.num_actors,
            max_count=config.actor_limit,
            max_load_each=config.upscale_queue_length,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
        )
        self._ready, self._fixed = dict(actors), frozenset(actors)
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._draining: dict[int, tuple[float, Any]] = {}
        self._reports: dict[str, _LoadReport] = {}
        self._scale_task: asyncio.Task[None] | None = None

    async def report(self, client_id: str, in_flight: Mapping[int, int]) -> dict[int, Any]:
        """Record a client's requests by slot, and return the decoders that accept requests."""
        self._reports[client_id] = _LoadReport(time.monotonic(), dict(in_flight))
        if self._scale_task is None:
            self._scale_task = asyncio.create_task(self._scale())
        return dict(self._ready)

    async def _scale(self) -> None:
        while True:
            try:
                self._adjust(time.monotonic())
            except Exception:
                log.exception("Scaling the decode pool failed; trying again in %g s", _TICK_S)
            await asyncio.sleep(_TICK_S)

    def _adjust(self, now: float) -> None:
        """Start or drain decoders by the load of all clients."""
        self._reports = {
            client_id: report for client_id, report in self._reports.items() if now - report.time_s < _REPORT_TTL_S
        }
        num_requests = sum(sum(report.in_flight.values()) for report in self._reports.values())
        num_actors = len(self._ready) + len(self._starting)
        target = self._policy.target_count(now, num_actors, num_requests)
        for _ in range(target - num_actors):
            self._start()
        for _ in range(num_actors - target):
            self._drain(now)
        self._stop_drained(now)

    def _start(self) -> None:
        used = {*self._ready, *self._starting, *self._draining}
        slot = next(slot for slot in range(len(used) + 1) if slot not in used)
        log.info("Starting decoder-%d: requests are queued", slot)
        self._starting[slot] = asyncio.create_task(self._register(slot))

    async def _register(self, slot: int) -> None:
        """Register the decoder when it responds."""
        name = f"decoder-{slot}"
        actor = start_decoder(name, self._driver, self._config, self._run_identity)
        try:
            await with_timeout(actor.busy_s.remote(), _START_TIMEOUT_S, target=name, operation="its start")
            self._ready[slot] = actor
        except Exception as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            log.warning("Failed to start %s: %s", name, cause)
            ray.kill(actor)
        finally:
            del self._starting[slot]

    def _drain(self, now: float) -> None:
        slot = max((slot for slot in self._ready if slot not in self._fixed), default=None)
        if slot is not None:
            log.info("Draining decoder-%d: it is idle", slot)
            self._draining[slot] = (now, self._ready.pop(slot))

    def _stop_drained(self, now: float) -> None:
        """Stop draining decoders that every client has unregistered and that have no requests left."""
        for slot, (since, actor) in list(self._draining.items()):
            reports = self._reports.values()
            unregistered = now - since >= _REPORT_TTL_S or all(report.time_s > since for report in reports)
            if unregistered and not any(report.in_flight.get(slot) for report in reports):
                ray.kill(actor)
                del self._draining[slot]
