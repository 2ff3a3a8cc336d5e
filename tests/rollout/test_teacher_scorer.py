"""Scoring of groups on teacher workers: retries after a lost worker or a timeout, and groups without frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.rollout.fake_workers import FakeWorkerClient, settle
from vz_ray.config.teacher import OnPolicyTeacherConfig
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, ExternalAction, Group, TokenContext, Trajectory, Turn
from vz_ray.monitoring import metric_names
from vz_ray.rollout.batch_collector import RolloutBatch
from vz_ray.rollout.teacher_scorer import SCORE_SECONDS_KEY, TeacherScorer, teacher_metrics
from vz_ray.rollout.worker_handle import WorkerLostError
from vz_ray.rollout.worker_pool import WorkerPool
from vz_ray.rollout.worker_wait import NoWorkersError
from vz_ray.utils.errors import UserError
from vz_ray.video.errors import VideoNotFoundError
from vz_ray.weight_sync import WeightPublisher


def group(task: str, size: int = 3) -> Group:
    turn = Turn(ExternalAction("ab", (1, 2)), "ab", None, None)
    ids = [EpisodeId(0, task, sample) for sample in range(size)]
    return Group(task, tuple(Trajectory(id, "", TokenContext((9,)), (turn,), EpisodeStatus.ANSWERED) for id in ids))


class FakeTeacherClient(FakeWorkerClient):
    """Scores a token with the sample number; `fail["score"]` and `unblocked` interfere."""

    async def score(self, trajectories: tuple[Trajectory, ...]) -> list[tuple[float, ...]]:
        self.calls.append(f"score {trajectories[0].id.task_id} x{len(trajectories)}")
        await self.unblocked.wait()
        self._record("score")
        return [(-1.0 - t.id.sample, -0.5) for t in trajectories]


@asynccontextmanager
async def open_scorer(
    script: Callable[[FakeTeacherClient], None] = lambda _: None, **settings: Any
) -> AsyncIterator[tuple[TeacherScorer, list[FakeTeacherClient]]]:
    workers: list[FakeTeacherClient] = []

    def spawn(name: str) -> FakeTeacherClient:
        workers.append(FakeTeacherClient(name))
        script(workers[-1])
        return workers[-1]

    config = OnPolicyTeacherConfig(model="teacher", health_check_interval_s=60.0, **settings)
    pool = WorkerPool(spawn, config, WeightPublisher(timeout_s=5), kind="teacher")
    await pool.start()
    try:
        yield TeacherScorer(pool, config), workers
    finally:
        await pool.close()


async def test_group_gets_the_log_probs_of_its_samples() -> None:
    async with open_scorer() as (scorer, workers):
        scored = await scorer.score_group(group("t0"))
    assert scored is not None
    assert [t.teacher_logprobs for t in scored.trajectories] == [(-1.0, -0.5), (-2.0, -0.5), (-3.0, -0.5)]
    assert [t.id.sample for t in scored.trajectories] == [0, 1, 2]
    assert [worker.name for worker in workers] == ["teacher-0"]
    batch = RolloutBatch(sampled=[(None, scored), (None, group("t1", 1))])  # type: ignore[list-item]
    metrics = teacher_metrics(batch)
    assert metrics[metric_names.TEACHER_SCORED_TOKENS] == 6 / 8
    assert metrics[metric_names.TEACHER_SCORE_SECONDS] == scored.trajectories[0].extra[SCORE_SECONDS_KEY]
    assert teacher_metrics(RolloutBatch(sampled=[(None, group("t1", 1))])) == {}  # type: ignore[list-item]


async def test_group_of_a_lost_worker_is_scored_on_its_replacement() -> None:
    def script(worker: FakeTeacherClient) -> None:
        if worker.name == "teacher-0":
            worker.fail["score"] = WorkerLostError("teacher-0 died during score: killed")

    async with open_scorer(script) as (scorer, workers):
        scored = await scorer.score_group(group("t0"))
    assert scored is not None
    assert all(t.teacher_logprobs for t in scored.trajectories)
    assert [worker.calls.count("score t0 x3") for worker in workers] == [1, 1]
    assert workers[0].ended


async def test_attempts_end_with_the_cause() -> None:
    def script(worker: FakeTeacherClient) -> None:
        worker.fail["score"] = WorkerLostError(f"{worker.name} died during score: no memory")

    async with open_scorer(script, max_attempts=2) as (scorer, workers):
        with pytest.raises(UserError, match=r"group of task t0 in 2 attempts \(.*\): teacher-1 died .* no memory"):
            await scorer.score_group(group("t0"))
    assert [worker.calls.count("score") for worker in workers[:2]] == [1, 1]


async def test_hung_worker_is_named_by_the_timeout() -> None:
    config = {"episode_timeout_s": 0.01, "turn_timeout_s": 0.01, "max_attempts": 2}
    async with open_scorer(lambda worker: worker.unblocked.clear(), **config) as (scorer, workers):
        with pytest.raises(UserError, match=r"teacher-0 did not finish scoring the group of task t0 within 0\.03 s"):
            await scorer.score_group(group("t0"))
    assert workers[0].calls.count("score t0 x3") == 2


async def test_groups_are_scored_concurrently_and_release_their_slots() -> None:
    async with open_scorer(lambda worker: worker.unblocked.clear(), max_concurrent_episodes=6) as (scorer, workers):
        running = [asyncio.create_task(scorer.score_group(group(f"t{i}"))) for i in range(5)]
        await settle()
        # Two groups of three fill the worker; the others wait.
        assert sum(call.startswith("score t") for call in workers[0].calls) == 2
        workers[0].unblocked.set()
        assert all(await asyncio.gather(*running))
        assert [status.load for status in scorer._pool.worker_statuses()] == [0]


async def test_group_without_frames_is_left_out() -> None:
    error = VideoNotFoundError("v.mp4 does not exist")
    async with open_scorer(lambda worker: worker.fail.update(score=error)) as (scorer, _):
        assert await scorer.score_group(group("t0")) is None
    assert [scorer.take_unreadable() for _ in range(2)] == ["v.mp4 does not exist", ""]


async def test_group_that_the_teacher_reads_differently_is_an_error() -> None:
    error = ValueError("teacher-0 reads 7 tokens in trajectory 0/t0/0#0 of 8 tokens")
    async with open_scorer(lambda worker: worker.fail.update(score=error)) as (scorer, _):
        with pytest.raises(UserError, match="cannot score the group of task t0: teacher-0 reads 7 tokens"):
            await scorer.score_group(group("t0"))


async def test_teacher_that_does_not_start_is_named() -> None:
    def script(worker: FakeTeacherClient) -> None:
        worker.fail["start"] = UserError("model 'x' has no config.json")

    with pytest.raises(NoWorkersError, match=r"no teacher worker can be started: .*no config\.json"):
        async with open_scorer(script):
            pass
