"""Scores the student's groups on a pool of teacher workers.

    score_group --> acquire a worker --> frames, one request per trajectory --> group with `teacher_logprobs`
                    '-- worker lost or timeout: the whole group again, on another worker if it is lost

Groups are scored as they finish, while others are rolled out.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import Protocol, cast

from vz_ray.config.teacher import OnPolicyTeacherConfig
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.monitoring import metric_names
from vz_ray.rollout.batch_collector import RolloutBatch
from vz_ray.rollout.teacher_worker import Logprobs
from vz_ray.rollout.worker_handle import WorkerLostError
from vz_ray.rollout.worker_pool import WorkerPool
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.video.errors import VideoError

log = logging.getLogger(__name__)

SCORE_SECONDS_KEY = "teacher_s"
"""Key in `Trajectory.extra` for the time in seconds to score its group, with the wait for a worker."""


def teacher_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Return the share of the step's sampled tokens that a teacher scored, and the mean time to score a group.

    Empty if nothing was scored.
    """
    trajectories = [trajectory for _, group in batch.sampled for trajectory in group.trajectories]
    scored = [trajectory for trajectory in trajectories if trajectory.teacher_logprobs]
    if not scored:
        return {}
    num_sampled = sum(len(turn.action.token_ids) for trajectory in trajectories for turn in trajectory.turns)
    seconds = [cast(float, trajectory.extra[SCORE_SECONDS_KEY]) for trajectory in scored]
    return {
        metric_names.TEACHER_SCORED_TOKENS: sum(len(t.teacher_logprobs) for t in scored) / num_sampled,
        metric_names.TEACHER_SCORE_SECONDS: sum(seconds) / len(seconds),
    }


class _ScoringClient(Protocol):
    async def score(self, trajectories: tuple[Trajectory, ...]) -> list[Logprobs]: ...


class TeacherScorer:
    """Adds the teacher's log-probs to groups.

    Args:
        pool: Workers whose clients are `TeacherWorkerClient`s.
        config: Concurrency, attempts, timeouts.
    """

    def __init__(self, pool: WorkerPool, config: OnPolicyTeacherConfig) -> None:
        self._pool, self._config = pool, config
        self._unreadable = ""

    def take_unreadable(self) -> str:
        """Return why a group was left out since the last call; empty if none was."""
        reason, self._unreadable = self._unreadable, ""
        return reason

    async def score_group(self, group: Group) -> Group | None:
        """Return the group with `teacher_logprobs`; None if its frames cannot be decoded again.

        Raises:
            UserError: It was not scored within `teacher.max_attempts`, or the teacher cannot read it.
            NoWorkersError: No teacher worker can be started.
        """
        started_at, reason = time.monotonic(), ""
        for _ in range(self._config.max_attempts):
            try:
                rows = await self._score_attempt(group)
            except (WorkerLostError, StepTimeout) as error:
                reason = str(error)
                log.warning("Scoring the group of task %s again: %s", group.task_id, reason)
            except VideoError as error:
                self._unreadable = str(error)
                log.warning("Dropping the group of task %s: the teacher lacks its frames: %s", group.task_id, error)
                return None
            except ValueError as error:
                raise UserError(f"the teacher cannot score the group of task {group.task_id}: {error}") from error
            else:
                seconds = round(time.monotonic() - started_at, 6)
                return replace(
                    group,
                    trajectories=tuple(
                        replace(t, teacher_logprobs=row, extra={**t.extra, SCORE_SECONDS_KEY: seconds})
                        for t, row in zip(group.trajectories, rows, strict=True)
                    ),
                )
        raise UserError(
            f"the teacher did not score the group of task {group.task_id} in {self._config.max_attempts} attempts "
            f"(teacher.max_attempts): {reason}"
        )

    async def _score_attempt(self, group: Group) -> list[Logprobs]:
        count, config = len(group.trajectories), self._config
        # The worker applies the same timeouts and reports the cause. Trajectories wait for the slots of other groups.
        waves = 1 + math.ceil(count / config.max_concurrent_episodes)
        timeout_s = config.episode_timeout_s + waves * config.turn_timeout_s
        async with self._pool.active_group(count) as worker:
            client: _ScoringClient = worker.client  # type: ignore[assignment]
            try:
                return await with_timeout(
                    client.score(group.trajectories),
                    timeout_s,
                    target=worker.name,
                    operation=f"scoring the group of task {group.task_id}",
                )
            except WorkerLostError as error:
                await self._pool.mark_lost(worker, str(error))
                raise
            finally:
                for _ in range(count):
                    self._pool.release(worker)
