"""The crew: which workers there are, from their start to their end, and the weights that they hold.

    start, scale --> a worker starts, and gets the present weights before its first token
    publish      --> every ready worker pauses, receives, is checked, resumes;
                     one that fails is killed and replaced
    watch        --> one that died is replaced; one whose node is about to go drains
    upkeep       --> those that could not be had before are tried again; a lack of any is told
    scale        --> episodes wait for places: more workers; workers idle: one of them drains

One asyncio loop owns all state, and every change of it beats `changed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from vz_ray.config.rollout import RolloutConfig
from vz_ray.rollout.no_worker_timeout import NoWorkerTimeout
from vz_ray.rollout.rollout_worker import WorkerStats
from vz_ray.rollout.worker_handle import (
    WorkerClient,
    WorkerHandle,
    WorkerLostError,
    WorkerStatus,
    WorkerUnschedulableError,
)
from vz_ray.rollout.worker_state import WorkerEvent, WorkerState, next_state
from vz_ray.utils.scaling_policy import ScalingPolicy
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync.publisher import PublishReport, WeightPublisher, WeightTransport, WeightUpdate

log = logging.getLogger(__name__)

_AUTOSCALE_INTERVAL_S = 0.5
"""How often the load is looked at."""
_NO_WORKER_WARN_AFTER_S, _NO_WORKER_WARN_EVERY_S = 10.0, 60.0
"""When a fleet without a worker says so, and how often again."""


class NoWorkersError(RuntimeError):
    """No worker can be had; says why the last ones could not."""


class ChangeNotifier:
    """Wakes whoever waits for a change of the crew; changes themselves never wait."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()


class WorkerPool:
    """Workers, and whoever waits for one.

    Args:
        spawn: Makes a worker of that name, not started yet.
        config: How many, and their deadlines.
        publisher: Brings weights to workers.
        starts: Consecutive failures to start after which it gives up.

    Attributes:
        changes: Beats at every change.
        workers: All workers there ever were, in order of their start.
        accepts_groups: Whether groups may begin.
        queued_episodes: Episodes of groups that have no worker yet.
        lost_workers: Workers that died, or never came.
        active_groups: Groups that have one and have not ended; between two attempts none of their episodes plays.
    """

    def __init__(
        self,
        spawn: Callable[[str], WorkerClient],
        config: RolloutConfig,
        publisher: WeightPublisher,
        max_start_failures: int,
    ) -> None:
        self._spawn, self._config, self._publisher, self._max_start_failures = (
            spawn,
            config,
            publisher,
            max_start_failures,
        )
        self._transport: WeightTransport | None = None
        self.workers: list[WorkerHandle] = []
        self.changes = ChangeNotifier()
        self.accepts_groups, self.queued_episodes, self.active_groups, self.lost_workers = True, 0, 0, 0
        self._weights_lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._num_spawned = 0
        self._start_failures: list[str] = []
        self._no_worker_timeout = NoWorkerTimeout(_NO_WORKER_WARN_AFTER_S, _NO_WORKER_WARN_EVERY_S)
        self._give_up_reason = ""
        self._closed = False
        self._scaler = ScalingPolicy(
            min_count=config.num_workers,
            max_count=config.worker_limit,
            max_load_each=config.max_concurrent_episodes,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
        )

    async def start(self) -> None:
        """Starts the workers; returns when the first is ready, the others come when they can.

        Where there may be none, it returns at once: workers come with the first episodes.

        Raises:
            FleetFailed, Overdue: None got ready; the fleet is closed.
        """
        for _ in range(self._config.num_workers):
            self._spawn_worker()
        self._run_in_background(self._maintain())
        if self._config.worker_limit > self._config.num_workers:
            self._run_in_background(self._autoscale())
        if not self._config.num_workers:
            return
        ready = self.wait_until(lambda: any(s.state is WorkerState.READY for s in self.workers))
        deadline, what = self._config.start_timeout_s, "starting its first worker"
        try:
            await with_timeout(ready, deadline, target="fleet", operation=what)
        except BaseException as error:
            why = self._last_loss_reason()
            await self.close()
            if isinstance(error, StepTimeout):
                raise StepTimeout("fleet", what, deadline, why) from error
            raise

    @property
    def version(self) -> int:
        """Weight version that ready workers hold; 0 is what they were started with."""
        current = self._publisher.current
        return current.version if current is not None else 0

    def worker_statuses(self) -> list[WorkerStatus]:
        """All workers there ever were, in order of their start."""
        return [WorkerStatus(s.client.name, s.state, s.load, s.reason) for s in self.workers]

    async def worker_stats(self) -> list[WorkerStats]:
        """Counts of the ready workers; one that does not answer is left out."""
        deadline = self._config.turn_timeout_s
        ready = [s.client for s in self.workers if s.state is WorkerState.READY]
        asked = [
            with_timeout(w.worker_stats(), deadline, target=w.name, operation="its stats") for w in ready
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, WorkerStats)]

    async def close(self) -> None:
        """Ends all workers. Whoever waits for a group gets `NoWorkersError`."""
        self._closed = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for member in self.workers:
            await self.mark_lost(member, "the fleet was closed")
            await self._terminate(member)

    def _spawn_worker(self) -> None:
        self._num_spawned += 1
        # The fleet does not depend on one that comes beside those it needs.
        extra = len(self._staying_workers()) >= max(1, self._config.num_workers)
        member = WorkerHandle(self._spawn(f"rollout-{self._num_spawned - 1}"), is_extra=extra)
        self.workers.append(member)
        self._run_in_background(self._start_worker(member))

    async def _start_worker(self, member: WorkerHandle) -> None:
        """Starts a worker and gives it the present weights."""
        worker, deadline = member.client, self._config.start_timeout_s
        try:
            await with_timeout(worker.start(), deadline, target=worker.name, operation="starting")
            async with self._weights_lock:
                if member.state is WorkerState.DEAD:
                    return  # let go before it was there
                self._transition(member, WorkerEvent.STARTED)
                if self._publisher.current is not None:
                    current = self._publisher.current
                    report = await self._publisher.deliver(
                        current, [worker], transport=self._transport, joining=True
                    )
                    if report.failed:
                        raise WorkerLostError(report.failed[worker.name])
                self._transition(member, WorkerEvent.SYNCED)
            member.was_ready = True
            self._start_failures.clear()
        except WorkerUnschedulableError as error:
            await self.mark_lost(member, str(error), replace=False)
        except Exception as error:
            if member.state is not WorkerState.DEAD and not member.is_extra:
                self._start_failures.append(f"{worker.name}: {type(error).__name__}: {error}")
            await self.mark_lost(member, str(error))
        else:
            await self._monitor(member)

    def _transition(self, member: WorkerHandle, event: WorkerEvent) -> None:
        member.state = next_state(member.state, event)
        self.changes.notify()

    async def mark_lost(self, member: WorkerHandle, reason: str, *, replace: bool = True) -> None:
        """Marks a worker dead, ends what is left of it, and starts another in its place.

        Not `replace` leaves the other to the upkeep.
        """
        if member.state is WorkerState.DEAD:
            return
        member.reason = reason
        self._transition(member, WorkerEvent.DIED)
        if not self._closed:
            self.lost_workers += 1
            log.warning("%s is out of service: %s", member.client.name, reason)
            if member.was_ready:
                self._start_failures.clear()
            if replace and len(self._start_failures) < self._max_start_failures:
                self._replace_missing()
        await self._terminate(member)

    def _replace_missing(self) -> None:
        """Starts as many workers as there are too few."""
        for _ in range(self._config.num_workers - len(self._staying_workers())):
            self._spawn_worker()

    def _any_serving(self) -> bool:
        """Whether any worker plays."""
        return any(s.state not in (WorkerState.STARTING, WorkerState.DEAD) for s in self.workers)

    def _staying_workers(self) -> list[WorkerHandle]:
        """Workers that play, or will."""
        gone = (WorkerState.DEAD, WorkerState.DRAINING)
        return [member for member in self.workers if member.state not in gone]

    async def _autoscale(self) -> None:
        """Starts and lets go workers as the load asks."""
        while True:
            await asyncio.sleep(_AUTOSCALE_INTERVAL_S)
            staying = self._staying_workers()
            load = sum(member.load for member in staying) + self.queued_episodes
            target = self._scaler.target_count(time.monotonic(), len(staying), load)
            for _ in range(target - len(staying)):
                self._spawn_worker()
            # One that gets weights at this moment could not finish what it plays.
            spare = [member for member in staying if member.state is not WorkerState.SYNCING]
            if target < len(staying) and spare:
                first = min(spare, key=lambda member: (member.state is WorkerState.READY, member.load))
                self._drain(first, "fewer workers will do")

    def _drain(self, member: WorkerHandle, why: str) -> None:
        """Gives a worker no new episodes, and ends it when it has played those that it has."""
        log.info("%s is to go: %s", member.client.name, why)
        member.reason = why
        self._transition(member, WorkerEvent.DRAIN)
        self._run_in_background(self._finish_drain(member))

    async def _finish_drain(self, member: WorkerHandle) -> None:
        # Its episodes have deadlines of their own, and leave it in any case.
        await self.changes.wait_until(lambda: not member.load or member.state is WorkerState.DEAD)
        if member.state is WorkerState.DRAINING:
            self._transition(member, WorkerEvent.EMPTY)
        await self._terminate(member)

    async def _terminate(self, member: WorkerHandle) -> None:
        if member.terminated:
            return
        try:
            await with_timeout(member.client.terminate(), 60, target=member.client.name, operation="ending")
        except Exception as error:
            log.warning("%s did not end cleanly: %s", member.client.name, error)
        member.terminated = True

    async def _monitor(self, member: WorkerHandle) -> None:
        """Finds out if a worker dies while nobody asks anything of it, or will have to go."""
        worker, deadline = member.client, self._config.turn_timeout_s
        while member.state in (WorkerState.READY, WorkerState.SYNCING):
            await asyncio.sleep(self._config.health_check_interval_s)
            if member.state is not WorkerState.READY:
                continue
            try:
                await with_timeout(
                    worker.check_health(), deadline, target=worker.name, operation="a health check"
                )
                why = await with_timeout(
                    worker.drain_reason(), deadline, target=worker.name, operation="word of its node"
                )
            except Exception as error:
                await self.mark_lost(member, str(error))
                return
            if why and member.state is WorkerState.READY:
                self._drain(member, why)
                self._replace_missing()

    async def _maintain(self) -> None:
        """Tries again to have as many workers as there should be, and tells when there is none at all."""
        while True:
            await asyncio.sleep(self._config.health_check_interval_s)
            # Without any that plays, failures to start are counted, and are the end in a while.
            if len(self._start_failures) < self._max_start_failures or self._any_serving():
                self._replace_missing()
            self._report_no_workers(time.monotonic())

    def _report_no_workers(self, now_s: float) -> None:
        absent = bool(self.queued_episodes or self.active_groups) and not self._any_serving()
        seconds, most_s = self._no_worker_timeout.elapsed_s(now_s, absent), self._config.no_worker_timeout_s
        if self._no_worker_timeout.should_warn(now_s):
            coming = ", ".join(s.client.name for s in self._staying_workers()) or "none"
            log.warning(
                "no rollout worker for %.0f s: %d episodes wait, and %d groups in part; to come: %s",
                *(seconds, self.queued_episodes, self.active_groups, coming),
            )
        if seconds > most_s:
            self._give_up_reason = f"for {seconds:.0f} s there was none (timeouts.no_workers_s is {most_s:g})"
            self.changes.notify()

    def _run_in_background(self, work: Any) -> None:
        """Runs in the background; asyncio itself would not keep it alive."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- weights ----------------------------------------------------------------

    async def publish(
        self, version: int, transport: WeightTransport, *, wait_for_episodes: bool = False
    ) -> PublishReport:
        """Brings new weights to every ready worker; those that fail are replaced.

        Episodes in flight go on with the new weights; with `wait_for_episodes`, they end before, and
        groups that have not begun wait.

        Raises:
            ValueError: `version` is not newer than the last one.
            Overdue: The learner was not ready in time; workers play on.
            WeightsBroken: The weights could not be sent; every worker is replaced.
        """
        # Stands still before it holds the weights: a worker that takes the place of a lost one needs them.
        async with (
            self._paused_rollout() if wait_for_episodes else contextlib.nullcontext(),
            self._weights_lock,
        ):
            began, self._transport = time.monotonic(), transport
            update = await self._publisher.prepare(version, transport)
            return await self._deliver(update, transport, time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def _paused_rollout(self) -> AsyncIterator[None]:
        """No group begins inside, and those that have begun have ended."""
        self.accepts_groups = False
        try:
            still = self.wait_until(lambda: not self.active_groups)
            # Each episode has its own deadline, for each of its attempts.
            once_s = 2 * (self._config.episode_timeout_s + self._config.turn_timeout_s)
            most_s = self._config.max_attempts * once_s
            await with_timeout(
                still, most_s, target="fleet", operation="the episodes in flight before an update"
            )
            yield
        finally:
            self.accepts_groups = True
            self.changes.notify()

    async def _deliver(
        self, update: WeightUpdate, sender: WeightTransport, prepare_s: float
    ) -> PublishReport:
        members = [s for s in self.workers if s.state is WorkerState.READY]
        for member in members:
            self._transition(member, WorkerEvent.PUBLISH)
        workers = [s.client for s in members]
        try:
            report = await self._publisher.deliver(update, workers, transport=sender, prepare_s=prepare_s)
        except BaseException as error:
            for member in members:
                self._run_in_background(self.mark_lost(member, str(error)))
            raise
        for member in members:
            if (why := report.failed.get(member.client.name)) is not None:
                self._run_in_background(self.mark_lost(member, why))
            elif member.state is WorkerState.SYNCING:
                self._transition(member, WorkerEvent.SYNCED)
        return report

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds; a fleet that cannot start workers raises instead."""

        def over() -> bool:
            return condition() or self._closed or self._cannot_recover()

        await self.changes.wait_until(over)
        if self._closed:
            raise NoWorkersError("the fleet was closed")
        if not condition():
            why = self._start_failures[-self._max_start_failures :] or [
                self._give_up_reason,
                self._last_loss_reason(),
            ]
            raise NoWorkersError(f"no rollout worker can be started: {'; '.join(filter(None, why))}")

    def _last_loss_reason(self) -> str:
        """Why the last worker that was lost was lost; empty if none was."""
        return next((member.reason for member in reversed(self.workers) if member.reason), "")

    def _cannot_recover(self) -> bool:
        if self._give_up_reason:
            return True
        alive = any(s.state is not WorkerState.DEAD for s in self.workers)
        return not alive and len(self._start_failures) >= self._max_start_failures
