"""The fleet: plays groups on whichever workers there are.

    play_group --> reserve a ready worker with a free place, for the whole group
                   |-- each episode: play -> accept in the ledger
                   |       worker died, or was too slow: owed again, played where there is room
                   '-- all accepted or given up: the group

Consumes tasks, produces groups in the order in which they finish. The workers
themselves, and the weights that they hold, are the crew's. One asyncio loop
owns all state; no pixels pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, Group, SamplingParams, TokenContext, Trajectory
from vz_ray.monitoring.log_context import log_context
from vz_ray.rollout.rollout_worker import WorkerStats
from vz_ray.rollout.routing import WorkerRouter
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.rollout.worker_handle import WorkerClient, WorkerHandle, WorkerLostError, WorkerStatus
from vz_ray.rollout.worker_pool import WorkerPool
from vz_ray.rollout.worker_state import WorkerState
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync.publisher import PublishReport, WeightPublisher, WeightTransport

log = logging.getLogger(__name__)

_STATUS_TIMEOUT_S = 10.0
"""How long a worker that is late may take to say what it is doing."""


@dataclass
class GroupPlacement:
    """Where a group is played; moves when its worker is lost, for all its samples at once."""

    worker: WorkerHandle
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RolloutScheduler:
    """Rollout workers and the work that is spread over them.

    Args:
        spawn: Makes a worker of that name, not started yet.
        config: How many workers, their places, deadlines and attempts.
        publisher: Brings weights to workers.
        starts: Consecutive failures to start after which the fleet gives up.

    Attributes:
        on_accepted: Called with each episode as it is accepted; must not raise or take long.
    """

    def __init__(
        self,
        spawn: Callable[[str], WorkerClient],
        config: RolloutConfig,
        publisher: WeightPublisher,
        *,
        max_start_failures: int = 3,
    ) -> None:
        self._pool, self._config = WorkerPool(spawn, config, publisher, max_start_failures), config
        self._queue_lock, self._router = asyncio.Lock(), WorkerRouter()
        self.on_accepted: Callable[[Trajectory], None] = lambda _: None

    async def start(self) -> None:
        """See `WorkerPool.start`."""
        await self._pool.start()

    async def close(self) -> None:
        """Ends all workers. Whoever waits for a group gets `NoWorkersError`."""
        await self._pool.close()

    async def publish(
        self, version: int, transport: WeightTransport, *, wait_for_episodes: bool = False
    ) -> PublishReport:
        """See `WorkerPool.publish`."""
        return await self._pool.publish(version, transport, wait_for_episodes=wait_for_episodes)

    async def worker_stats(self) -> list[WorkerStats]:
        """Counts of the ready workers; one that does not answer is left out."""
        return await self._pool.worker_stats()

    @property
    def version(self) -> int:
        """Weight version that ready workers hold; 0 is what they were started with."""
        return self._pool.version

    @property
    def queued_episodes(self) -> int:
        """Episodes of groups that have no worker yet."""
        return self._pool.queued_episodes

    @property
    def lost_workers(self) -> int:
        """Workers that died, or never came."""
        return self._pool.lost_workers

    @property
    def num_serving_workers(self) -> int:
        """Workers that serve now."""
        serving = (WorkerState.READY, WorkerState.SYNCING)
        return sum(seat.state in serving for seat in self.worker_statuses())

    def worker_statuses(self) -> list[WorkerStatus]:
        """All workers there ever were, in order of their start."""
        return self._pool.worker_statuses()

    async def rollout(
        self,
        tasks: Iterable[Task],
        group_size: int,
        sampling_params: SamplingParams,
        tracker: SampleTracker,
        *,
        step: int = 0,
    ) -> AsyncIterator[Group]:
        """Plays `group_size` episodes of each task; yields groups as they finish.

        Closing the iterator gives up what has not finished: it stays owed in `tracker`.
        """
        pending = {
            asyncio.create_task(self.rollout_group(task, group_size, sampling_params, tracker, step=step))
            for task in tasks
        }
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for group in done:
                    yield group.result()
        finally:
            await _cancel_all(pending)

    async def rollout_group(
        self,
        task: Task,
        group_size: int,
        sampling_params: SamplingParams,
        tracker: SampleTracker,
        *,
        step: int = 0,
        episode_config: EpisodeConfig | None = None,
        extra_samples: int = 0,
    ) -> Group:
        """Plays all samples of a task on one worker, as long as it lives.

        `episode_config` takes the place of the workers' own rules, for an evaluation of another kind.
        With `extra_samples`, so many further samples are played, the first `group_size` that end are the group
        and the others are given up: no group waits for its longest episodes, and long ones are
        in groups less often than they are played.

        A sample that was tried too often becomes a FAILED trajectory that says
        why, and is dropped in `tracker`. Waits for a worker with room first, in
        the order of the calls.

        Raises:
            FleetFailed: No worker can be had.
        """
        ids = tracker.register(step, task.task_id, group_size + extra_samples)
        return await self.rollout_samples(
            task, ids, sampling_params, tracker, episode_config, keep=group_size
        )

    async def rollout_samples(
        self,
        task: Task,
        ids: Sequence[EpisodeId],
        sampling_params: SamplingParams,
        tracker: SampleTracker,
        episode_config: EpisodeConfig | None = None,
        *,
        keep: int | None = None,
    ) -> Group:
        """As `rollout_group`, for samples that `tracker` already knows to be owed; the first `keep` are kept."""
        self._pool.queued_episodes += len(ids)
        try:
            async with self._queue_lock:
                home = GroupPlacement(await self._reserve(len(ids), begins=True))
        finally:
            self._pool.queued_episodes -= len(ids)
        self._pool.active_groups += 1
        plays = [
            asyncio.create_task(
                self._rollout_sample(task, id, sampling_params, tracker, home, episode_config)
            )
            for id in ids
        ]
        try:
            # Lets each of them begin, as each gives its reserved place back when it ends.
            await asyncio.sleep(0)
            kept = await _first_completed(plays, len(ids) if keep is None else keep)
        finally:
            await _cancel_all(plays)
            self._pool.active_groups -= 1
            self._pool.changes.notify()
        for id in ids:
            if id.sample_key in tracker.attempts:
                tracker.discard(id.sample_key, "a spare sample, not needed")
        return Group(task.task_id, kept)

    async def _rollout_sample(
        self,
        task: Task,
        id: EpisodeId,
        sampling: SamplingParams,
        ledger: SampleTracker,
        home: GroupPlacement,
        episode: EpisodeConfig | None,
    ) -> Trajectory:
        """Plays one owed sample until it is accepted or given up. Its place at home is reserved."""
        member = home.worker
        while True:
            try:
                with log_context(step=id.step, episode=str(id), worker=member.client.name):
                    trajectory = await self._run_attempt(member, task, id, sampling, episode)
            except (WorkerLostError, StepTimeout) as error:
                why = str(error)
            else:
                ledger.accept(trajectory.id)
                self._router.record_episode(trajectory.num_tokens)
                self.on_accepted(trajectory)
                return trajectory
            finally:
                member.load -= 1
                self._pool.changes.notify()
            if id.attempt + 1 >= self._config.max_attempts:
                ledger.discard(id.sample_key, why)
                return Trajectory(id, "", TokenContext(()), (), EpisodeStatus.FAILED, error=why)
            id = ledger.retry(id.sample_key)
            member = await self._replace_placement(home)

    async def _run_attempt(
        self,
        member: WorkerHandle,
        task: Task,
        id: EpisodeId,
        sampling: SamplingParams,
        episode: EpisodeConfig | None,
    ) -> Trajectory:
        worker = member.client
        # The worker has the same deadline, and names the cause; this one is for a worker that hangs.
        # Before its place there is free, another episode may have to end.
        deadline = 2 * self._config.episode_timeout_s + 2 * self._config.turn_timeout_s
        try:
            return await with_timeout(
                worker.run_episode(task, id, sampling, episode),
                deadline,
                target=worker.name,
                operation=f"episode {id}",
            )
        except WorkerLostError as error:
            await self._pool.mark_lost(member, str(error))
            raise
        except StepTimeout as overdue:
            if overdue.state:
                raise
            raise StepTimeout(
                overdue.target, overdue.operation, overdue.timeout_s, await self._inspect_worker(worker)
            ) from overdue

    async def _inspect_worker(self, worker: WorkerClient) -> str:
        """What a worker that was waited for too long is doing; its stacks go to the log."""
        try:
            state, where = await with_timeout(
                worker.describe_state(), _STATUS_TIMEOUT_S, target=worker.name, operation="its whereabouts"
            )
        except Exception as error:
            return f"and does not say what it is doing: {type(error).__name__}"
        log.warning("%s was waited for too long: %s\n%s", worker.name, state, where)
        return state

    async def _reserve(self, places: int, *, begins: bool = False) -> WorkerHandle:
        """The ready worker with the most room, once one has a free place; `places` on it are taken.

        A group goes to one worker as soon as that has any place: samples beyond its places wait
        there for the next ones to end, so that no place stays empty until a whole group fits. One
        that `begins` waits while the fleet admits none.
        """
        cap = self._config.max_concurrent_episodes

        def free() -> list[WorkerHandle]:
            return [s for s in self._pool.workers if s.state is WorkerState.READY and s.load < cap]

        await self._pool.wait_until(lambda: (self._pool.accepts_groups or not begins) and bool(free()))
        member = self._router.choose(free())
        member.load += places
        return member

    async def _replace_placement(self, home: GroupPlacement) -> WorkerHandle:
        """A place for a sample that is played again: at its group's home, or at a new one."""
        async with home.lock:
            if home.worker.state in (WorkerState.READY, WorkerState.SYNCING):
                home.worker.load += 1
            else:
                home.worker = await self._reserve(1)
            return home.worker


async def _first_completed(plays: Sequence[asyncio.Task[Trajectory]], keep: int) -> tuple[Trajectory, ...]:
    """The first `keep` that did not fail, or failed ones where there are not as many; in order of sample."""
    pending, ended = set(plays), list[Trajectory]()
    while pending and sum(t.status is not EpisodeStatus.FAILED for t in ended) < keep:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        ended += [play.result() for play in done]
    ended.sort(key=lambda t: t.status is EpisodeStatus.FAILED)
    return tuple(sorted(ended[:keep], key=lambda t: t.id.sample))


async def _cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels what is not done, and waits until it has ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
