"""Background loops of a worker pool: scaling, health checks, and missing workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vz_ray.config.rollout import RolloutConfig
from vz_ray.rollout.worker_handle import WorkerHandle, WorkerState
from vz_ray.rollout.worker_wait import NoWorkerTimeout
from vz_ray.utils.scaling_policy import ScalingPolicy
from vz_ray.utils.timeouts import with_timeout

if TYPE_CHECKING:
    from vz_ray.rollout.worker_pool import WorkerPool

log = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 300.0
"""Maximum timeout of health checks and counters, which do not wait for turns."""
_SCALE_INTERVAL_S = 0.5
_COLLECT_INTERVAL_S = 5.0
"""A lost worker costs at most the turns of this time and the turns in progress."""
_NO_WORKER_WARN_AFTER_S, _NO_WORKER_WARN_EVERY_S = 10.0, 60.0


class PoolMaintenance:
    """Loops that change a pool through its methods.

    Args:
        kind: Kind of the workers, for messages.
    """

    def __init__(self, pool: WorkerPool, config: RolloutConfig, kind: str) -> None:
        self._pool, self._config, self._kind = pool, config, kind
        self._no_worker_timeout = NoWorkerTimeout(_NO_WORKER_WARN_AFTER_S, _NO_WORKER_WARN_EVERY_S)
        self._num_keeping = 0
        self._policy = ScalingPolicy(
            min_count=config.num_workers,
            max_count=config.worker_limit,
            max_load_each=config.max_concurrent_episodes,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
        )

    @contextlib.contextmanager
    def keep_workers(self) -> Iterator[None]:
        """See `WorkerPool.keep_workers`."""
        self._num_keeping += 1
        try:
            yield
        finally:
            self._num_keeping -= 1
            self._policy.idle_since = None

    async def scale(self) -> None:
        """Start workers for queued episodes; drain one idle worker at a time."""
        pool = self._pool
        while True:
            await asyncio.sleep(_SCALE_INTERVAL_S)
            staying = pool.staying_workers()
            load = sum(worker.load for worker in staying) + pool.queued_episodes
            target = self._policy.target_count(time.monotonic(), len(staying), load)
            if self._num_keeping:
                target = max(target, len(staying))
            for _ in range(target - len(staying)):
                pool.spawn_worker()
            # A SYNCING worker cannot finish its paused episodes.
            drainable = [worker for worker in staying if worker.state is not WorkerState.SYNCING]
            if target < len(staying) and drainable:
                worker = min(drainable, key=lambda worker: (worker.state is WorkerState.READY, worker.load))
                pool.drain(worker, "the load needs fewer workers")

    async def monitor(self, worker: WorkerHandle) -> None:
        """Replace a worker that dies while idle; drain and replace one on a preempted node."""
        client, timeout_s = worker.client, min(self._config.turn_timeout_s, STATUS_TIMEOUT_S)
        checked_states = (WorkerState.READY, WorkerState.ASLEEP)  # the check of a sleeping engine needs no GPU
        while worker.state in (*checked_states, WorkerState.SYNCING):
            await asyncio.sleep(self._config.health_check_interval_s)
            if worker.state not in checked_states:
                continue
            try:
                await with_timeout(client.check_health(), timeout_s, target=client.name, operation="a health check")
                drain_reason = await with_timeout(
                    client.drain_reason(), timeout_s, target=client.name, operation="checking its node for preemption"
                )
            except Exception as error:
                await self._pool.mark_lost(worker, str(error))
                return
            if drain_reason and worker.state in checked_states:
                self._pool.drain(worker, drain_reason)
                self._pool.start_missing()

    async def collect_turns(self, worker: WorkerHandle) -> None:
        """Store the completed turns of a worker's episodes, so that they survive the worker."""
        client, timeout_s = worker.client, min(self._config.turn_timeout_s, STATUS_TIMEOUT_S)
        while worker.state is not WorkerState.DEAD:
            await asyncio.sleep(_COLLECT_INTERVAL_S)
            if not worker.load:
                continue
            try:
                turns = await with_timeout(
                    client.read_completed_turns(), timeout_s, target=client.name, operation="reading its turns"
                )
            except Exception as error:
                # Calls in flight and health checks find a dead worker.
                log.debug("No turns from worker %s: %s", client.name, error)
            else:
                # An episode may have ended meanwhile.
                running = worker.completed_turns.keys() & turns.keys()
                worker.completed_turns |= {episode_id: turns[episode_id] for episode_id in running}

    async def retry_missing(self) -> None:
        """Retry workers that could not be started; report a lack of workers, and give up after a time."""
        while True:
            await asyncio.sleep(self._config.health_check_interval_s)
            self._pool.retry_missing()
            self._report_no_workers(time.monotonic())

    def _report_no_workers(self, now_s: float) -> None:
        pool = self._pool
        absent = bool(pool.queued_episodes or pool.active_groups) and not pool.any_serving()
        elapsed_s, timeout_s = self._no_worker_timeout.elapsed_s(now_s, absent), self._config.no_worker_timeout_s
        if self._no_worker_timeout.should_warn(now_s):
            starting = ", ".join(worker.name for worker in pool.staying_workers()) or "none"
            log.warning(
                "No %s worker for %.0f s: %d episodes queued, %d groups active, workers starting: %s",
                *(self._kind, elapsed_s, pool.queued_episodes, pool.active_groups, starting),
            )
        if elapsed_s > timeout_s:
            pool.give_up(f"no worker for {elapsed_s:.0f} s (timeouts.no_workers_s is {timeout_s:g})")
