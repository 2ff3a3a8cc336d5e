"""When the loop stops by itself."""

from __future__ import annotations

import pytest

from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Context, EpisodeId, Group, RewardParts, Status, Trajectory
from vz_ray.observe.errors import UserError
from vz_ray.rollout.collect import Batch
from vz_ray.train import stop_on_failures

TASK = Task("t", "v.mp4", "?", "A")
GOOD = RewardParts(1.0, 1.0, 1.0, 0.0)


def invalid(note: str) -> RewardParts:
    return RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note=note)


def batch(*rewards: RewardParts, status: Status = Status.ANSWERED) -> Batch:
    played = Batch()
    for sample, reward in enumerate(rewards):
        id = EpisodeId(0, "t", sample)
        trajectory = Trajectory(id, "", Context(()), (), status, reward=reward, error="no engine")
        played.played.append((TASK, Group("t", (trajectory,))))
    return played


def test_episodes_that_nobody_could_judge_stop_it_with_the_reason() -> None:
    notes = [invalid("judge nonsense: 'well'"), invalid("judge status 401: bad key")]
    with pytest.raises(UserError, match=r"none of the 2 episodes .* the last: judge status 401: bad key"):
        stop_on_failures(batch(*notes))


def test_one_judged_episode_lets_it_go_on() -> None:
    stop_on_failures(batch(invalid("judge timeout: late"), GOOD))


def test_episodes_that_all_failed_stop_it_with_their_error() -> None:
    with pytest.raises(UserError, match=r"all 2 episodes .* no engine"):
        stop_on_failures(batch(invalid("failed: x"), invalid("failed: x"), status=Status.FAILED))
