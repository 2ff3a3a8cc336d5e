"""Checks of a step, and the checkpoints that are kept."""

from __future__ import annotations

from dataclasses import replace
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
from vz_ray.training.loop import checkpoint_metric, draw_episode_config, validate_and_checkpoint
from vz_ray.training.state import TrainingState, list_checkpoints
from vz_ray.training.step_metrics import check_batch, check_teacher
from vz_ray.utils.errors import UserError

TASK = Task("t", "v.mp4", "?", "A")
VALID = RewardParts(1.0, 1.0, 1.0, 0.0)


def invalid_reward(note: str) -> RewardParts:
    return RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note=note)


def batch(*rewards: RewardParts, status: EpisodeStatus = EpisodeStatus.ANSWERED) -> RolloutBatch:
    rollout_batch = RolloutBatch()
    for sample, reward in enumerate(rewards):
        id = EpisodeId(0, "t", sample)
        trajectory = Trajectory(id, "", TokenContext(()), (), status, reward=reward, error="no engine")
        rollout_batch.sampled.append((TASK, Group("t", (trajectory,))))
    return rollout_batch


def test_overview_frames_of_a_group_depend_on_seed_step_and_task() -> None:
    def frames(config: GrpoRunConfig, step: int, task: str) -> int:
        episode = draw_episode_config(config, step, Task(task, "v.mp4", "what?", "A"))
        assert episode is not None
        assert replace(episode, overview_frames=64) == config.episode
        return episode.overview_frames

    config = load_config(GrpoRunConfig, None, ["train.min_overview_frames=4"])
    drawn = [frames(config, step, f"t{i}") for step in range(20) for i in range(20)]
    assert drawn == [frames(config, step, f"t{i}") for step in range(20) for i in range(20)]
    assert (min(drawn), max(drawn)) == (4, 64)
    assert sum(drawn) / len(drawn) == pytest.approx(34, abs=3)
    assert drawn != [frames(replace(config, seed=1), step, f"t{i}") for step in range(20) for i in range(20)]
    assert draw_episode_config(GrpoRunConfig(), 0, Task("t", "v.mp4", "what?", "A")) is None


def test_batch_without_valid_reward_is_rejected() -> None:
    notes = [invalid_reward("judge nonsense: 'well'"), invalid_reward("judge status 401: bad key")]
    with pytest.raises(UserError, match=r"all 2 scored episodes .* the last reason: judge status 401: bad key"):
        check_batch(batch(*notes))


def test_batch_with_one_valid_reward_is_accepted() -> None:
    check_batch(batch(invalid_reward("judge timeout: late"), VALID))


def test_batch_of_failed_episodes_is_rejected() -> None:
    with pytest.raises(UserError, match=r"all 2 episodes .* no engine"):
        check_batch(batch(invalid_reward("failed: x"), invalid_reward("failed: x"), status=EpisodeStatus.FAILED))


def test_batch_whose_groups_the_teacher_cannot_read_is_rejected() -> None:
    runtime = SimpleNamespace(teacher=SimpleNamespace(take_unreadable=lambda: "v.mp4 does not exist"))
    sampled = batch(VALID)
    with pytest.raises(UserError, match=r"the teacher scored no group of the step; the last reason: v\.mp4 does not"):
        check_teacher(sampled, runtime)
    sampled.kept.append(sampled.sampled[0][1])
    check_teacher(sampled, runtime)
    check_teacher(batch(VALID), SimpleNamespace(teacher=None))


def test_invalid_rewards_do_not_matter_without_rewards_in_the_loss() -> None:
    check_batch(batch(invalid_reward("judge timeout: late")), rewards_needed=False)


def test_checkpoint_metric_prefers_validation() -> None:
    row = {"reward/total": 0.5, "reward/accuracy": 0.4, "validation/reward/accuracy": 0.3}
    assert checkpoint_metric(row, 5) == ("validation/reward/accuracy", 0.3)
    assert checkpoint_metric(row, 0) == ("reward/total", 0.5)
    assert checkpoint_metric({}, 5) is None


async def test_best_checkpoint_is_kept_besides_newest(tmp_path: Path) -> None:
    async def save_checkpoint(directory: Path) -> None:
        directory.mkdir()

    monitor = SimpleNamespace(on_phase=lambda phase: None, on_checkpoint=lambda step: None)
    runtime = SimpleNamespace(monitor=monitor, learner=SimpleNamespace(save_checkpoint=save_checkpoint))
    settings = ["validate_every=0", "checkpoint_every=2", "keep_checkpoints=1", "keep_best=1"]
    config = load_config(GrpoRunConfig, None, [f"train.{setting}" for setting in settings])
    run, _ = RunDir.create_or_resume(tmp_path / "run", "")
    state = TrainingState(TaskSampler([Task("t", "v.mp4", "what?", "A", AnswerType.MULTIPLE_CHOICE)]))
    for reward in (0.1, 0.8, 0.9, 0.3, 0.2, 0.4):
        state.finish_step()
        await validate_and_checkpoint(config, state, run, runtime, None, {"reward/total": reward}, None)
    assert [path.name for path in list_checkpoints(run)] == ["step-000002", "step-000006"]
