"""Schedule groups of episodes on the rollout workers.

    rollout_group --> acquire slots on one worker for the whole group
                      |-- each sample: run the episode -> accept it in the tracker
                      |       worker lost: continue after its last reported turn, on a new worker
                      |       timeout: retry from the start
                      '-- all samples accepted or discarded: return the group

Consumes tasks and yields groups in completion order. The worker pool owns the workers and their
weights. One asyncio loop owns all state. Pixels never pass through the scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, Group, SamplingParams, TokenContext, Trajectory
from vz_ray.monitoring.log_context import log_context
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.rollout.worker_handle import WorkerClient, WorkerHandle, WorkerLostError
from vz_ray.rollout.worker_pool import WorkerPool
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync import WeightPublisher

log = logging.getLogger(__name__)

_STATUS_TIMEOUT_S = 10.0
"""Timeout for the state report of a worker that has exceeded another timeout."""


@dataclass
class GroupPlacement:
    """Worker of a group. If the worker is lost, all samples of the group move together."""

    worker: WorkerHandle
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RolloutScheduler:
    """Run groups of episodes on a pool of rollout workers.

    Args:
        spawn: Create a client for a worker with the given name, without starting the worker.
        config: Number of workers, concurrency, timeouts, attempts.
        publisher: Delivers weights to workers.
        max_start_failures: Consecutive start failures before `NoWorkersError` is raised.

    Attributes:
        pool: The workers and their weights. Start it before the first rollout, and close it at the end.
        on_accepted: Callback for each accepted episode. It must not raise or block.
    """

    def __init__(
        self,
        spawn: Callable[[str], WorkerClient],
        config: RolloutConfig,
        publisher: WeightPublisher,
        *,
        max_start_failures: int = 3,
    ) -> None:
        self.pool, self._config = WorkerPool(spawn, config, publisher, max_start_failures), config
        self.on_accepted: Callable[[Trajectory], None] = lambda _: None

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
        """Sample a group of one task on one worker.

        Groups acquire workers in call order. A sample that fails `max_attempts` times becomes a FAILED
        trajectory with the reason, and is discarded in `tracker`.

        Args:
            task: Task of the group.
            group_size: Number of trajectories to return.
            sampling_params: Sampling parameters of every turn.
            tracker: Registers and accepts the samples.
            step: Training step of the episode ids.
            episode_config: Overrides the workers' episode config, for evaluations.
            extra_samples: Samples to run beyond `group_size`. The first `group_size` to finish are
                kept and the others are cancelled. This avoids stragglers, but biases groups towards
                short episodes.

        Raises:
            NoWorkersError: No worker can be started.
        """
        ids = tracker.register(step, task.task_id, group_size + extra_samples)
        async with self.pool.active_group(len(ids)) as worker:
            placement = GroupPlacement(worker)
            samples = [
                asyncio.create_task(
                    self._rollout_sample(task, episode_id, sampling_params, tracker, placement, episode_config)
                )
                for episode_id in ids
            ]
            try:
                # Start every task before any cancellation: each task releases its own slot.
                await asyncio.sleep(0)
                kept = await _first_completed(samples, group_size)
            finally:
                await _cancel_all(samples)
        for episode_id in ids:
            if episode_id.sample_key in tracker.attempts:
                tracker.discard(episode_id.sample_key, "extra sample, not needed")
        return Group(task.task_id, kept)

    async def _rollout_sample(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        tracker: SampleTracker,
        placement: GroupPlacement,
        episode_config: EpisodeConfig | None,
    ) -> Trajectory:
        """Run one sample until it is accepted or discarded. Its slot is already acquired."""
        worker, completed_turns = placement.worker, b""
        while True:
            episode_tokens, worker.completed_turns[episode_id] = None, b""
            try:
                with log_context(step=episode_id.step, episode=str(episode_id), worker=worker.name):
                    trajectory = await self._run_attempt(
                        worker, task, episode_id, sampling_params, episode_config, completed_turns
                    )
            except WorkerLostError as error:
                reason = str(error)
                completed_turns = worker.completed_turns[episode_id] or completed_turns
            except StepTimeout as error:
                reason, completed_turns = str(error), b""
            else:
                tracker.accept(trajectory.id)
                episode_tokens = trajectory.num_tokens
                self.on_accepted(trajectory)
                return trajectory
            finally:
                worker.completed_turns.pop(episode_id, None)
                self.pool.release(worker, episode_tokens=episode_tokens)
            if episode_id.attempt + 1 >= self._config.max_attempts:
                tracker.discard(episode_id.sample_key, reason)
                return Trajectory(episode_id, "", TokenContext(()), (), EpisodeStatus.FAILED, error=reason)
            episode_id = tracker.retry(episode_id.sample_key)
            async with placement.lock:
                worker = placement.worker = await self.pool.acquire(placement.worker)

    async def _run_attempt(
        self,
        worker: WorkerHandle,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
        completed_turns: bytes,
    ) -> Trajectory:
        client = worker.client
        # The worker applies the same timeout and reports the cause. This one covers a hung worker. It is
        # twice as long, because the episode may first wait for another episode's slot.
        timeout_s = 2 * self._config.episode_timeout_s + 2 * self._config.turn_timeout_s
        try:
            return await with_timeout(
                client.run_episode(task, episode_id, sampling_params, episode_config, completed_turns),
                timeout_s,
                target=client.name,
                operation=f"episode {episode_id}",
            )
        except WorkerLostError as error:
            await self.pool.mark_lost(worker, str(error))
            raise
        except StepTimeout as error:
            if error.state:
                raise
            state = await self._inspect_worker(client)
            raise StepTimeout(error.target, error.operation, error.timeout_s, state) from error

    async def _inspect_worker(self, client: WorkerClient) -> str:
        """Return the state of a worker after a timeout, and log its stacks."""
        try:
            state, stacks = await with_timeout(
                client.describe_state(),
                _STATUS_TIMEOUT_S,
                target=client.name,
                operation="reporting its state",
            )
        except Exception as error:
            return f"state unavailable: {type(error).__name__}"
        log.warning("Timeout of worker %s: %s\n%s", client.name, state, stacks)
        return state


async def _first_completed(samples: Sequence[asyncio.Task[Trajectory]], keep: int) -> tuple[Trajectory, ...]:
    """Return the first `keep` trajectories to finish, in sample order.

    FAILED trajectories are used only if there are too few others.
    """
    pending, finished = set(samples), list[Trajectory]()
    while pending and sum(t.status is not EpisodeStatus.FAILED for t in finished) < keep:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        finished += [sample.result() for sample in done]
    finished.sort(key=lambda t: t.status is EpisodeStatus.FAILED)
    return tuple(sorted(finished[:keep], key=lambda t: t.id.sample))


async def _cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel unfinished tasks and wait until they have ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
