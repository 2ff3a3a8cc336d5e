"""Rewards of single turns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.rewards.test_scorer import REJECTED, TASK, make_trajectory
from vz_ray.config.reward import RewardConfig, TurnRewardConfig
from vz_ray.env.serialization import trajectory_from_dict, trajectory_to_dict
from vz_ray.env.trajectory import TokenContext, Trajectory
from vz_ray.rewards import score_episode
from vz_ray.rewards.turn_rewards import score_turns
from vz_ray.video.frame import FrameRef, ZoomRequest


def clip(*times: float) -> TokenContext:
    refs = tuple(FrameRef("v", "v.mp4", 0, t, 28, 28, "bicubic", "av", "00") for t in times)
    return TokenContext((7,) * len(refs), ((1, 2, 2),) * len(refs), refs, pad_id=7, merge_size=2)


def with_clips(trajectory: Trajectory, *clips: TokenContext) -> Trajectory:
    turns = [replace(turn, observation=context) for turn, context in zip(trajectory.turns, clips, strict=False)]
    return replace(trajectory, turns=(*turns, *trajectory.turns[len(clips) :]))


def test_served_zooms_are_rewarded_and_rejected_ones_are_not() -> None:
    trajectory = make_trajectory("B", REJECTED, ZoomRequest(1, 3, 2))
    assert score_turns(trajectory, TASK, TurnRewardConfig(valid_zoom=0.2)) == (0.0, 0.2, 0.0)


def test_time_counts_once_per_video() -> None:
    """Segments [0, 4], [2, 6], [1, 9] and [1, 3]; the last is in another video, then repeated."""
    zooms = [ZoomRequest(0, 4, 2), ZoomRequest(2, 6, 2), ZoomRequest(1, 9, 2), ZoomRequest(1, 3, 2, video=1)]
    trajectory = make_trajectory("B", *zooms, zooms[-1])
    rewards = score_turns(trajectory, TASK, TurnRewardConfig(new_time=1.0))
    assert rewards == pytest.approx((1.0, 0.5, 3 / 8, 1.0, 0.0, 0.0))


def test_gap_between_earlier_zooms_is_new_time() -> None:
    trajectory = make_trajectory("B", ZoomRequest(0, 2, 2), ZoomRequest(6, 8, 2), ZoomRequest(1, 7, 2))
    assert score_turns(trajectory, TASK, TurnRewardConfig(new_time=1.0))[2] == pytest.approx(4 / 6)


def test_evidence_is_rewarded_when_first_shown() -> None:
    task = replace(TASK, evidence_spans=((2.0, 2.5), (5.0, 5.5)))
    zoom = ZoomRequest(1, 9, 2)
    trajectory = with_clips(make_trajectory("B", zoom, zoom, zoom), clip(1.0, 3.0), clip(2.2, 3.0), clip(2.2, 5.0))
    config = TurnRewardConfig(evidence=1.0)
    assert score_turns(trajectory, task, config) == (0.0, 0.5, 0.5, 0.0)
    assert score_turns(trajectory, TASK, config) == (0.0, 0.0, 0.0, 0.0), "the spans are unknown"


def test_turn_rewards_are_kept_apart_from_the_total_and_in_the_log() -> None:
    trajectory = make_trajectory("B", ZoomRequest(1, 3, 2))
    plain = score_episode(trajectory, TASK, RewardConfig())
    scored = score_episode(trajectory, TASK, RewardConfig(turns=TurnRewardConfig(valid_zoom=0.2)))
    assert plain.turns == ()
    assert scored == replace(plain, turns=(0.2, 0.0))
    for parts in (plain, scored):
        data = json.loads(json.dumps(trajectory_to_dict(replace(trajectory, reward=parts))))
        assert ("turns" in data["reward"]) == bool(parts.turns)
        assert trajectory_from_dict(data).reward == parts


def test_invalid_weight_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"new_time is -0\.1"):
        TurnRewardConfig(new_time=-0.1)
