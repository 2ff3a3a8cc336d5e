"""When the loop stops by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vz_ray.config import load
from vz_ray.config.run import RunConfig
from vz_ray.data.cursor import TaskCursor
from vz_ray.data.task import AnswerType, Task
from vz_ray.episode.trajectory import Context, EpisodeId, Group, RewardParts, Status, Trajectory
from vz_ray.observe.errors import UserError
from vz_ray.observe.run_dir import RunDir
from vz_ray.rollout.collect import Batch
from vz_ray.run_state import RunState, checkpoints
from vz_ray.train import figure_of, stop_on_failures, validate_and_save

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


def test_a_checkpoint_is_compared_by_validation_where_there_is_one_and_else_by_reward() -> None:
    row = {"reward/total": 0.5, "reward/accuracy": 0.4, "validation/reward/accuracy": 0.3}
    assert figure_of(row, 5) == ("validation/reward/accuracy", 0.3)
    assert figure_of(row, 0) == ("reward/total", 0.5)
    assert figure_of({}, 5) is None


async def test_the_best_of_a_run_is_kept_beside_its_newest(tmp_path: Path) -> None:
    async def save_checkpoint(directory: Path) -> None:
        directory.mkdir()

    watch = SimpleNamespace(doing=lambda what: None, saved=lambda iteration: None)
    actors = SimpleNamespace(watch=watch, learner=SimpleNamespace(save_checkpoint=save_checkpoint))
    settings = ["evaluate_every=0", "checkpoint_every=2", "keep_checkpoints=1", "keep_best=1"]
    config = load(RunConfig, None, [f"train.{setting}" for setting in settings])
    run, _ = RunDir.begin(tmp_path / "run", "")
    state = RunState(TaskCursor([Task("t", "v.mp4", "what?", "A", AnswerType.MULTIPLE_CHOICE)]))
    for reward in (0.1, 0.8, 0.9, 0.3, 0.2, 0.4):
        state.close()
        await validate_and_save(config, state, run, actors, None, {"reward/total": reward})
    assert [path.name for path in checkpoints(run)] == ["step-000002", "step-000006"]
