"""Advantages and loss masks of single turns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vz_ray.config.loss import LossConfig
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    Group,
    RewardParts,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
)
from vz_ray.learner.advantages import (
    break_ties,
    compute_advantages,
    discounted_returns,
    group_advantages,
    outcome_advantages,
    turns_with_loss,
)
from vz_ray.video.frame import FrameRef, ZoomRequest

ZOOM = ZoomRequest(1, 3, 2)
HALF = np.sqrt(0.5)


def make_trajectory(sample: int, total: float, turn_rewards: tuple[float, ...]) -> Trajectory:
    """Return zooms with the given rewards and an answer with the last one."""
    action = SampledAction((1, 2), (0.0, 0.0), (), SamplingParams(), "end")
    zooms = [Turn(action, "", ZOOM, TokenContext((1,))) for _ in turn_rewards[:-1]]
    return Trajectory(
        EpisodeId(0, "t", sample),
        "",
        TokenContext((1,)),
        (*zooms, Turn(action, "", None, None)),
        EpisodeStatus.ANSWERED,
        reward=RewardParts(total, total, 0, 0, turns=turn_rewards),
    )


def make_group(*samples: tuple[float, tuple[float, ...]]) -> Group:
    return Group("t", tuple(make_trajectory(i, total, turns) for i, (total, turns) in enumerate(samples)))


def test_without_turn_credit_a_trajectory_has_one_advantage() -> None:
    group = make_group((1.0, (0.5, 0.0)), (0.0, (0.0,)), (1.5, (0.0,)))
    for kind in ("grpo", "dr_grpo"):
        got = group_advantages(group, LossConfig(advantage_estimator=kind))
        assert [len(values) for values in got] == [1, 1, 1]
        assert np.array_equal(np.concatenate(got), compute_advantages(group.rewards, kind))


def test_shaped_credit_adds_the_normalized_reward_of_a_zoom() -> None:
    """Outcome advantages 0.71 and -0.71. First zooms have rewards 1 and 0; the second zoom has no counterpart."""
    group = make_group((1.0, (1.0, 0.0)), (0.0, (0.0, 0.3, 0.0)))
    first, second = group_advantages(group, LossConfig(turn_credit="shaped", turn_coef=0.5))
    assert first == pytest.approx([1.5 * HALF, HALF], abs=1e-5)
    assert second == pytest.approx([-1.5 * HALF, -HALF, -HALF], abs=1e-5)


def test_shaped_credit_does_not_compare_answers_with_zooms() -> None:
    """One sample answers in its first turn: both keep the outcome's advantage."""
    group = make_group((1.0, (1.0, 0.0)), (0.0, (0.0,)))
    first, second = group_advantages(group, LossConfig(turn_credit="shaped"))
    assert first == pytest.approx([HALF, HALF], abs=1e-5)
    assert second == pytest.approx([-HALF], abs=1e-5)


def test_returns_are_discounted_and_include_the_outcome() -> None:
    assert discounted_returns(make_trajectory(0, 1.0, (0.5, 0.0)), 0.9) == pytest.approx([1.4, 1.0])
    assert discounted_returns(make_trajectory(0, 1.0, (0.2, 0.4, 0.1)), 0.5) == pytest.approx([0.675, 0.95, 1.1])


def test_return_credit_normalizes_the_returns_of_each_turn() -> None:
    """Returns [1.4, 1.0], [0.9, 1.0] and [0.2, 0.0, 0.0]: the turn without counterpart keeps the outcome's."""
    group = make_group((1.0, (0.5, 0.0)), (1.0, (0.0, 0.0)), (0.0, (0.2, 0.0, 0.0)))
    got = group_advantages(group, LossConfig(turn_credit="returns", advantage_estimator="dr_grpo"))
    first_mean, second_mean = (1.4 + 0.9 + 0.2) / 3, 2 / 3
    assert got[0] == pytest.approx([1.4 - first_mean, 1 - second_mean])
    assert got[1] == pytest.approx([0.9 - first_mean, 1 - second_mean])
    assert got[2] == pytest.approx([0.2 - first_mean, -second_mean, -2 / 3])
    scaled = group_advantages(group, LossConfig(turn_credit="returns"))
    assert [row[0] for row in scaled] == pytest.approx(compute_advantages([1.4, 0.9, 0.2]))


def with_frames(group: Group, frames: tuple[int, ...]) -> Group:
    """Return the group with zooms that returned this many frames."""
    trajectories = []
    for trajectory, count in zip(group.trajectories, frames, strict=True):
        refs = tuple(FrameRef("v", "v.mp4", 0, float(i), 28, 28, "s", "d", str(i)) for i in range(count))
        observation = TokenContext((7,) * count, ((1, 2, 2),) * count, refs, pad_id=7, merge_size=2)
        turn = replace(trajectory.turns[0], zoom=ZOOM, observation=observation)
        trajectories.append(replace(trajectory, turns=(turn, *trajectory.turns[1:])))
    return replace(group, trajectories=tuple(trajectories))


def test_ties_of_correct_samples_are_broken_by_zoomed_frames() -> None:
    group = with_frames(make_group(*[(r, (0.0, 0.0)) for r in (1, 1, 1, 0, 0)]), (8, 16, 12, 2, 4))
    assert break_ties(group, 0.05).rewards == pytest.approx((1, 0.95, 0.975, 0, 0))
    assert break_ties(group, 0.0) is group
    same = with_frames(make_group((1, (0.0, 0.0)), (1, (0.0, 0.0)), (0, (0.0, 0.0))), (4, 4, 1))
    assert break_ties(same, 0.05).rewards == same.rewards
    config = LossConfig(frame_tie_break=0.05, advantage_estimator="dr_grpo")
    advantages = np.concatenate(group_advantages(group, config))
    assert advantages == pytest.approx(np.array([1, 0.95, 0.975, 0, 0]) - 2.925 / 5)
    assert outcome_advantages(group, config) == pytest.approx(advantages)
    assert group_advantages(group, replace(config, turn_credit="returns"))[1][-1] == pytest.approx(0.95 - 2.925 / 5)


def test_trajectory_without_turn_rewards_is_refused() -> None:
    group = make_group((1.0, (1.0, 0.0)), (0.0, (0.0, 0.0)))
    unscored = replace(group.trajectories[0], reward=RewardParts(1.0, 1.0, 0, 0))
    with pytest.raises(ValueError, match=r"0/t/0#0 has 0 turn rewards for 2 turns; .* a weight in reward\.turns"):
        group_advantages(
            replace(group, trajectories=(unscored, group.trajectories[1])), LossConfig(turn_credit="shaped")
        )


def test_truncated_turns_and_episodes_are_masked() -> None:
    trajectory = make_trajectory(0, 0.0, (0.0, 0.0))
    first, last = trajectory.turns
    assert isinstance(last.action, SampledAction)
    cut = replace(
        trajectory,
        turns=(first, replace(last, action=replace(last.action, stop_reason="length"))),
        status=EpisodeStatus.TRUNCATED,
    )
    assert [turns_with_loss(cut, kind).tolist() for kind in ("none", "turn", "episode")] == [[1.0], [1, 0], [0, 0]]
    assert [turns_with_loss(trajectory, kind).tolist() for kind in ("turn", "episode")] == [[1, 1], [1, 1]]
