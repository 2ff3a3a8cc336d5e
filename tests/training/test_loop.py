"""When the loop stops by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, Group, RewardParts, TokenContext, Trajectory
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rollout.batch_collector import RolloutBatch
from vz_ray.training.loop import check_batch, checkpoint_metric, validate_and_checkpoint
from vz_ray.training.state import TrainingState, list_checkpoints
from vz_ray.utils.errors import UserError

TASK = Task("t", "v.mp4", "?", "A")
GOOD = RewardParts(1.0, 1.0, 1.0, 0.0)


def invalid(note: str) -> RewardParts:
    return RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note=note)


def batch(*rewards: RewardParts, status: EpisodeStatus = EpisodeStatus.ANSWERED) -> RolloutBatch:
    played = RolloutBatch()
    for sample, reward in enumerate(rewards):
        id = EpisodeId(0, "t", sample)
        trajectory = Trajectory(id, "", TokenContext(()), (), status, reward=reward, error="no engine")
        played.sampled.append((TASK, Group("t", (trajectory,))))
    return played


def test_episodes_that_nobody_could_judge_stop_it_with_the_reason() -> None:
    notes = [invalid("judge nonsense: 'well'"), invalid("judge status 401: bad key")]
    with pytest.raises(UserError, match=r"none of the 2 episodes .* the last: judge status 401: bad key"):
        check_batch(batch(*notes))


def test_one_judged_episode_lets_it_go_on() -> None:
    check_batch(batch(invalid("judge timeout: late"), GOOD))


def test_episodes_that_all_failed_stop_it_with_their_error() -> None:
    with pytest.raises(UserError, match=r"all 2 episodes .* no engine"):
        check_batch(batch(invalid("failed: x"), invalid("failed: x"), status=EpisodeStatus.FAILED))


def test_a_checkpoint_is_compared_by_validation_where_there_is_one_and_else_by_reward() -> None:
    row = {"reward/total": 0.5, "reward/accuracy": 0.4, "validation/reward/accuracy": 0.3}
    assert checkpoint_metric(row, 5) == ("validation/reward/accuracy", 0.3)
    assert checkpoint_metric(row, 0) == ("reward/total", 0.5)
    assert checkpoint_metric({}, 5) is None


async def test_the_best_of_a_run_is_kept_beside_its_newest(tmp_path: Path) -> None:
    async def save_checkpoint(directory: Path) -> None:
        directory.mkdir()

    watch = SimpleNamespace(doing=lambda what: None, saved=lambda iteration: None)
    actors = SimpleNamespace(watch=watch, learner=SimpleNamespace(save_checkpoint=save_checkpoint))
    settings = ["evaluate_every=0", "checkpoint_every=2", "keep_checkpoints=1", "keep_best=1"]
    config = load_config(GrpoRunConfig, None, [f"train.{setting}" for setting in settings])
    run, _ = RunDir.create_or_resume(tmp_path / "run", "")
    state = TrainingState(TaskSampler([Task("t", "v.mp4", "what?", "A", AnswerType.MULTIPLE_CHOICE)]))
    for reward in (0.1, 0.8, 0.9, 0.3, 0.2, 0.4):
        state.finish_step()
        await validate_and_checkpoint(config, state, run, actors, None, {"reward/total": reward})
    assert [path.name for path in list_checkpoints(run)] == ["step-000002", "step-000006"]
