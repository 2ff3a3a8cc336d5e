"""Lifecycle of the rollout workers: start, weight updates, draining, replacement.

    start, autoscale --> start a worker and send it the current weights before its first token
    publish          --> every READY worker pauses, receives, is probed and resumes;
                         a worker that fails is terminated and replaced
    sleep            --> every READY worker frees its GPU; it wakes at the next publish

Background loops in `pool_maintenance` scale the pool, check the workers' health and retry missing workers.
Consumers call `active_group()`, `acquire()` and `release()` to use workers, and `mark_lost()` to report
a failure. One asyncio loop owns all state. Every change notifies the tasks in `wait_until`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from vz_ray.config.rollout import RolloutConfig
from vz_ray.rollout.pool_maintenance import STATUS_TIMEOUT_S, PoolMaintenance
from vz_ray.rollout.rollout_worker import WorkerStats
from vz_ray.rollout.routing import WorkerRouter
from vz_ray.rollout.worker_handle import (
    WorkerClient,
    WorkerEvent,
    WorkerHandle,
    WorkerLostError,
    WorkerState,
    WorkerStatus,
    WorkerUnschedulableError,
    next_state,
)
from vz_ray.rollout.worker_wait import ChangeNotifier, NoWorkersError
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync import PublishReport, WeightPublisher, WeightTransport, WeightUpdate

log = logging.getLogger(__name__)


class WorkerPool:
    """Rollout workers and their weights.

    Workers move STARTING -> SYNCING -> READY -> DRAINING -> DEAD. A dead worker never returns; its
    replacement gets a new name and the current weights before its first token.

    Args:
        spawn: Create a client for a worker with the given name, without starting the worker.
        config: Number of workers, concurrency, timeouts.
        publisher: Delivers weights to workers.
        max_start_failures: Consecutive start failures before the pool raises `NoWorkersError`.
        kind: Prefix of the names of workers.

    Attributes:
        queued_episodes: Episodes of groups that wait for a worker.
        lost_workers: Workers that died or failed to start.
    """

    def __init__(
        self,
        spawn: Callable[[str], WorkerClient],
        config: RolloutConfig,
        publisher: WeightPublisher,
        max_start_failures: int = 3,
        *,
        kind: str = "rollout",
    ) -> None:
        self._kind = kind
        self._spawn, self._config, self._publisher = spawn, config, publisher
        self._max_start_failures = max_start_failures
        self.queued_episodes, self.lost_workers = 0, 0
        self._workers: list[WorkerHandle] = []
        self._router = WorkerRouter()
        self._changes = ChangeNotifier()
        self._queue_lock, self._weights_lock = asyncio.Lock(), asyncio.Lock()
        self._accepts_groups, self._active_groups = True, 0
        # With shared GPUs: whether engines may use them, and workers that started while they may.
        self._owns_gpus, self._starting = True, set[str]()
        self._transport: WeightTransport | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._start_failures: list[str] = []
        self._give_up_reason = ""
        self._closed = False
        self._maintenance = PoolMaintenance(self, config, kind)

    async def start(self) -> None:
        """Start the workers and return when the first is READY.

        Return at once if the minimum number of workers is 0: autoscaling starts workers on demand.

        Raises:
            NoWorkersError, StepTimeout: No worker became READY. The pool is closed.
        """
        for _ in range(self._config.num_workers):
            self.spawn_worker()
        self._run_in_background(self._maintenance.retry_missing())
        if self._config.worker_limit > self._config.num_workers:
            self._run_in_background(self._maintenance.scale())
        if not self._config.num_workers:
            return
        ready = self._wait_until(lambda: bool(self._ready_workers()))
        timeout_s, operation = self._config.start_timeout_s, "starting its first worker"
        try:
            await with_timeout(ready, timeout_s, target="worker pool", operation=operation)
        except BaseException as error:
            reason = self._last_loss_reason()
            await self.close()
            if isinstance(error, StepTimeout):
                raise StepTimeout("worker pool", operation, timeout_s, reason) from error
            raise

    async def close(self) -> None:
        """Terminate all workers. Tasks that wait for a worker raise `NoWorkersError`."""
        self._closed = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for worker in self._workers:
            await self.mark_lost(worker, "the worker pool was closed")
            await worker.terminate()

    # -- state --------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Newest weight version, also if its publish failed; 0 is the initial checkpoint."""
        return self._publisher.newest

    @property
    def num_serving_workers(self) -> int:
        """Number of workers that are READY, SYNCING or ASLEEP."""
        serving = (WorkerState.READY, WorkerState.SYNCING, WorkerState.ASLEEP)
        return sum(worker.state in serving for worker in self._workers)

    def worker_statuses(self) -> list[WorkerStatus]:
        """Return the status of every worker ever started, in start order."""
        return [worker.status() for worker in self._workers]

    async def worker_stats(self) -> list[WorkerStats]:
        """Return the counters of the READY workers. Workers that do not respond are omitted."""
        timeout_s = min(self._config.turn_timeout_s, STATUS_TIMEOUT_S)
        calls = [
            with_timeout(worker.client.worker_stats(), timeout_s, target=worker.name, operation="reading its stats")
            for worker in self._ready_workers()
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        return [result for result in results if isinstance(result, WorkerStats)]

    @property
    def active_groups(self) -> int:
        """Number of groups that use a worker."""
        return self._active_groups

    # -- use of workers -----------------------------------------------------------

    @contextlib.asynccontextmanager
    async def active_group(self, num_episodes: int) -> AsyncIterator[WorkerHandle]:
        """Acquire `num_episodes` slots on one worker for a new group, in call order.

        A publish with `wait_for_episodes` waits until all active groups have ended. The caller must
        `release` each slot.

        Raises:
            NoWorkersError: No worker can be started.
        """
        self.queued_episodes += num_episodes
        try:
            async with self._queue_lock:
                worker = await self._acquire(num_episodes, new_group=True)
        finally:
            self.queued_episodes -= num_episodes
        self._active_groups += 1
        try:
            yield worker
        finally:
            self._active_groups -= 1
            self._changes.notify()

    async def acquire(self, preferred: WorkerHandle) -> WorkerHandle:
        """Acquire one slot for a retry: on `preferred` if it still serves, else on another worker."""
        if preferred.state in (WorkerState.READY, WorkerState.SYNCING):
            preferred.load += 1
            return preferred
        return await self._acquire(1, new_group=False)

    def release(self, worker: WorkerHandle, *, episode_tokens: int | None = None) -> None:
        """Release one slot. `episode_tokens` is the length of a completed episode, for routing."""
        if episode_tokens is not None:
            self._router.record_episode(episode_tokens)
        worker.load -= 1
        self._changes.notify()

    async def mark_lost(self, worker: WorkerHandle, reason: str, *, replace: bool = True) -> None:
        """Mark a worker DEAD, terminate it and start a replacement.

        With `replace=False`, the maintenance loop starts the replacement later.
        """
        if worker.state is WorkerState.DEAD:
            return
        worker.reason = reason
        self._transition(worker, WorkerEvent.DIED)
        if not self._closed:
            self.lost_workers += 1
            log.warning("Lost worker %s: %s", worker.name, reason)
            if worker.was_ready:
                self._start_failures.clear()
            if replace and len(self._start_failures) < self._max_start_failures:
                self.start_missing()
        await self._terminate(worker)

    async def _terminate(self, worker: WorkerHandle) -> None:
        await worker.terminate()
        self._changes.notify()

    async def _acquire(self, num_slots: int, *, new_group: bool) -> WorkerHandle:
        """Reserve `num_slots` on the READY worker with the most free capacity.

        One free slot suffices: the remaining samples of a group queue on the same worker, so that no
        slot is idle until a whole group fits. A new group waits while a publish drains active groups.
        """

        def candidates() -> list[WorkerHandle]:
            limit = self._config.max_concurrent_episodes
            return [worker for worker in self._ready_workers() if worker.load < limit]

        await self._wait_until(lambda: (self._accepts_groups or not new_group) and bool(candidates()))
        worker = self._router.choose(candidates())
        worker.load += num_slots
        return worker

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds.

        Raises:
            NoWorkersError: The pool was closed, or no worker can be started.
        """
        await self._changes.wait_until(lambda: condition() or self._closed or self._cannot_recover())
        if self._closed:
            raise NoWorkersError("the worker pool was closed")
        if not condition():
            reasons = self._start_failures[-self._max_start_failures :] or [
                self._give_up_reason,
                self._last_loss_reason(),
            ]
            raise NoWorkersError(f"no {self._kind} worker can be started: {'; '.join(filter(None, reasons))}")

    def give_up(self, reason: str) -> None:
        """Make tasks that wait for a worker raise `NoWorkersError`."""
        self._give_up_reason = reason
        self._changes.notify()

    def keep_workers(self) -> contextlib.AbstractContextManager[None]:
        """Keep the workers of the block although they have no episodes: the next batch needs them."""
        return self._maintenance.keep_workers()

    # -- start and end of workers -------------------------------------------------

    def spawn_worker(self) -> None:
        """Start a worker in the background."""
        # A failed start counts against the pool only if the worker is needed to reach the minimum.
        is_extra = len(self.staying_workers()) >= max(1, self._config.num_workers)
        worker = WorkerHandle(self._spawn(f"{self._kind}-{len(self._workers)}"), is_extra=is_extra)
        self._workers.append(worker)
        self._run_in_background(self._start_worker(worker))

    async def _start_worker(self, worker: WorkerHandle) -> None:
        """Start a worker, send it the current weights and monitor it until it dies or drains.

        While the learner uses the GPUs, the start waits: a starting engine needs its GPU.
        """
        await self._changes.wait_until(lambda: self._owns_gpus or worker.state is WorkerState.DEAD)
        if worker.state is WorkerState.DEAD:
            return  # drained before the start
        self._starting.add(worker.name)
        try:
            is_ready = await self._bring_up(worker)
        finally:
            self._starting.discard(worker.name)
            self._changes.notify()
        if is_ready:
            self._run_in_background(self._maintenance.collect_turns(worker))
            await self._maintenance.monitor(worker)

    async def _bring_up(self, worker: WorkerHandle) -> bool:
        """Start a worker and send it the current weights. Return whether it is READY."""
        client = worker.client
        try:
            await with_timeout(client.start(), self._config.start_timeout_s, target=client.name, operation="starting")
            async with self._weights_lock:
                if worker.state is WorkerState.DEAD:
                    return False  # drained during the start
                self._transition(worker, WorkerEvent.STARTED)
                if self._publisher.current is not None:
                    report = await self._publisher.deliver(
                        self._publisher.current, [client], transport=self._transport, joining=True
                    )
                    if report.failed:
                        raise WorkerLostError(report.failed[client.name])
                self._transition(worker, WorkerEvent.SYNCED)
            worker.was_ready = True
            self._start_failures.clear()
        except WorkerUnschedulableError as error:
            await self.mark_lost(worker, str(error), replace=False)
        except Exception as error:
            if worker.state is not WorkerState.DEAD and not worker.is_extra:
                self._start_failures.append(f"{client.name}: {type(error).__name__}: {error}")
            await self.mark_lost(worker, str(error))
        else:
            return True
        return False

    def _transition(self, worker: WorkerHandle, event: WorkerEvent) -> None:
        worker.state = next_state(worker.state, event)
        self._changes.notify()

    def retry_missing(self) -> None:
        """Start missing workers again. Start failures end the run only while no worker serves."""
        if len(self._start_failures) < self._max_start_failures or self.any_serving():
            self.start_missing()

    def start_missing(self) -> None:
        """Start workers until the minimum number is reached."""
        for _ in range(self._config.num_workers - len(self.staying_workers())):
            self.spawn_worker()

    def _ready_workers(self) -> list[WorkerHandle]:
        return [worker for worker in self._workers if worker.state is WorkerState.READY]

    def any_serving(self) -> bool:
        """Return whether any worker has started and not died."""
        return any(worker.state not in (WorkerState.STARTING, WorkerState.DEAD) for worker in self._workers)

    def staying_workers(self) -> list[WorkerHandle]:
        """Return the workers that serve or will serve."""
        leaving = (WorkerState.DEAD, WorkerState.DRAINING)
        return [worker for worker in self._workers if worker.state not in leaving]

    def _last_loss_reason(self) -> str:
        return next((worker.reason for worker in reversed(self._workers) if worker.reason), "")

    def _cannot_recover(self) -> bool:
        if self._give_up_reason:
            return True
        alive = any(worker.state is not WorkerState.DEAD for worker in self._workers)
        return not alive and len(self._start_failures) >= self._max_start_failures

    def drain(self, worker: WorkerHandle, reason: str) -> None:
        """Assign no new episodes to a worker, and terminate it after its last episode."""
        log.info("Draining worker %s: %s", worker.name, reason)
        worker.reason = reason
        self._transition(worker, WorkerEvent.DRAIN)
        self._run_in_background(self._finish_drain(worker))

    async def _finish_drain(self, worker: WorkerHandle) -> None:
        # No timeout here: each episode has its own.
        await self._changes.wait_until(lambda: not worker.load or worker.state is WorkerState.DEAD)
        if worker.state is WorkerState.DRAINING:
            self._transition(worker, WorkerEvent.EMPTY)
        await self._terminate(worker)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task, keep a reference to it (asyncio keeps only a weak one), and log its exception."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._end_background)

    def _end_background(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Background task of the worker pool failed: %s", error, exc_info=error)

    # -- weights ------------------------------------------------------------------

    async def publish(
        self, version: int, transport: WeightTransport, *, wait_for_episodes: bool = False
    ) -> PublishReport:
        """Publish new weights to every READY or sleeping worker and replace workers that fail.

        Sleeping workers wake up. Running episodes continue with the new weights. With `wait_for_episodes`,
        they finish first and new groups wait.

        Raises:
            ValueError: `version` is not newer than the current version.
            StepTimeout: The learner was not ready in time. Workers continue with the old weights.
            WeightIntegrityError: The weights could not be sent. Every worker is replaced.
        """
        # Wait for episodes before taking the lock: a replacement worker needs the lock to finish them.
        async with (
            self._paused_rollout() if wait_for_episodes else contextlib.nullcontext(),
            self._weights_lock,
        ):
            started_at, self._transport = time.monotonic(), transport
            clients = [worker.client for worker in self._ready_workers()]
            update = await self._publisher.prepare(version, transport, clients)
            report = await self._deliver(update, transport, time.monotonic() - started_at)
        self._owns_gpus = True
        self._changes.notify()
        return report

    async def sleep(self, level: int) -> None:
        """Let every engine free its GPU for the learner, until the next `publish`. Idempotent.

        Active groups and starting workers finish first, and the processes of lost workers end. Until the publish,
        new workers wait before their engine starts, and new groups wait for READY workers. A worker that fails is
        terminated and replaced.

        Args:
            level: See `EngineClient.sleep`.

        Raises:
            StepTimeout: A worker did not start or end in time.
        """
        owned_gpus, self._owns_gpus, self._accepts_groups = self._owns_gpus, False, False
        try:
            await with_timeout(
                self._changes.wait_until(lambda: self._closed or self._is_idle()),
                self._config.start_timeout_s + self._config.turn_timeout_s,
                target="worker pool",
                operation="the end of episodes and starts before the engines sleep",
            )
            async with self._weights_lock:
                await self._publisher.continue_probe([worker.client for worker in self._ready_workers()])
                await asyncio.gather(*(self._put_to_sleep(worker, level) for worker in self._ready_workers()))
        except BaseException:
            self._owns_gpus = owned_gpus
            raise
        finally:
            self._accepts_groups = True
            self._changes.notify()

    def _is_idle(self) -> bool:
        """Return whether only READY engines use GPUs, without episodes."""
        leaving = any(
            worker.state is WorkerState.DRAINING or (worker.state is WorkerState.DEAD and not worker.terminated)
            for worker in self._workers
        )
        return not (self._active_groups or self._starting or leaving)

    async def _put_to_sleep(self, worker: WorkerHandle, level: int) -> None:
        self._transition(worker, WorkerEvent.SLEEP)
        try:
            await with_timeout(
                worker.client.sleep(level), self._config.turn_timeout_s, target=worker.name, operation="falling asleep"
            )
        except Exception as error:
            await self.mark_lost(worker, str(error))

    @contextlib.asynccontextmanager
    async def _paused_rollout(self) -> AsyncIterator[None]:
        """Block new groups and wait until active groups have ended."""
        self._accepts_groups = False
        try:
            # Each attempt of an episode has its own timeout.
            attempt_s = 2 * (self._config.episode_timeout_s + self._config.turn_timeout_s)
            await with_timeout(
                self._wait_until(lambda: not self._active_groups),
                self._config.max_attempts * attempt_s,
                target="worker pool",
                operation="the episodes in flight before an update",
            )
            yield
        finally:
            self._accepts_groups = True
            self._changes.notify()

    async def _deliver(self, update: WeightUpdate, transport: WeightTransport, prepare_s: float) -> PublishReport:
        ready = [worker for worker in self._workers if worker.state in (WorkerState.READY, WorkerState.ASLEEP)]
        for worker in ready:
            self._transition(worker, WorkerEvent.PUBLISH)
        clients = [worker.client for worker in ready]
        try:
            report = await self._publisher.deliver(update, clients, transport=transport, prepare_s=prepare_s)
        except BaseException as error:
            for worker in ready:
                self._run_in_background(self.mark_lost(worker, str(error)))
            raise
        for worker in ready:
            if (reason := report.failed.get(worker.name)) is not None:
                self._run_in_background(self.mark_lost(worker, reason))
            elif worker.state is WorkerState.SYNCING:
                self._transition(worker, WorkerEvent.SYNCED)
        return report
