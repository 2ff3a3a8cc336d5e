"""Length penalty and frame cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rewards.test_scorer import GOOD, TASK, make_trajectory
from vz_ray.config.reward import RewardConfig
from vz_ray.env.trajectory import ExternalAction, TokenContext, Trajectory
from vz_ray.rewards import score_episode
from vz_ray.rewards.scorer import frame_cost, length_penalty
from vz_ray.video.frame import FrameRef


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0), (100, 0), (101, -0.01), (150, -0.5), (200, -1), (5000, -1)])
def test_length_penalty_is_linear_above_free_tokens(tokens: int, penalty: float) -> None:
    assert length_penalty(tokens, free_tokens=100, max_tokens=200) == pytest.approx(penalty)


@pytest.mark.parametrize(("frames", "cost"), [(0, 0), (8, -0.125), (64, -1), (65, -1)])
def test_frame_cost_is_linear(frames: int, cost: float) -> None:
    assert frame_cost(frames, max_frames=64) == pytest.approx(cost)


def make_long_trajectory(tokens: int, frames: int) -> Trajectory:
    """Build two turns with `tokens` in total, an overview of 3 frames and a zoom of `frames`."""
    refs = tuple(FrameRef("v", "v.mp4", 0, t / 2, 28, 28, "bicubic", "av", "00") for t in range(frames + 3))

    def context(part: tuple[FrameRef, ...]) -> TokenContext:
        return TokenContext((7,) * len(part), ((1, 2, 2),) * len(part), part, pad_id=7, merge_size=2)

    trajectory = make_trajectory("B", GOOD)
    first, last = trajectory.turns
    first = replace(
        first, action=ExternalAction(first.text, (1,) * (tokens - tokens // 2)), observation=context(refs[3:])
    )
    last = replace(last, action=ExternalAction(last.text, (1,) * (tokens // 2)))
    return replace(trajectory, prompt=context(refs[:3]), turns=(first, last))


def test_penalties_are_separate_weighted_parts() -> None:
    config = RewardConfig(
        length_penalty=0.5,
        length_free_tokens=100,
        length_full_tokens=200,
        frame_cost=0.2,
        frame_cost_full_frames=16,
    )
    parts = score_episode(make_long_trajectory(tokens=150, frames=8), TASK, config)
    assert parts.extra == pytest.approx({"length": -0.5, "frames": -0.5})
    assert parts.total == pytest.approx(1.5 - 0.5 * 0.5 - 0.2 * 0.5)
    assert (parts.accuracy, parts.format, parts.tool) == (1, 1, 1)


def test_penalties_are_off_by_default() -> None:
    trajectory = make_long_trajectory(tokens=10_000, frames=16)
    assert score_episode(trajectory, TASK, RewardConfig()).extra == {}
    assert score_episode(trajectory, TASK, RewardConfig()).total == 1.5
    assert score_episode(trajectory, TASK, RewardConfig(length_penalty=1.0)).extra == {"length": -1.0}
    assert score_episode(trajectory, TASK, RewardConfig(frame_cost=1.0)).extra == {"frames": -0.25}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length_penalty": -0.1}, r"length_penalty is -0.1"),
        ({"frame_cost": float("nan")}, r"frame_cost is nan"),
        ({"frame_cost_full_frames": 0}, r"frame_cost_full_frames is 0"),
        ({"length_free_tokens": 4096}, r"length_free_tokens is 4096; .* \(4096\)"),
    ],
)
def test_invalid_shaping_config_is_rejected(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**values)  # type: ignore[arg-type]
