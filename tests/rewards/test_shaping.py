"""Costs of length and of frames: off by default, each a part of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rewards.test_scorer import GOOD, TASK, make_trajectory
from vz_ray.config.reward import RewardConfig
from vz_ray.env.trajectory import ExternalAction, TokenContext, Trajectory
from vz_ray.rewards import score_episode
from vz_ray.rewards.shaping import frame_cost, length_penalty
from vz_ray.video.frame import FrameRef


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0), (100, 0), (101, -0.01), (150, -0.5), (200, -1), (5000, -1)]
)
def test_the_penalty_grows_evenly_between_free_and_full(tokens: int, penalty: float) -> None:
    assert length_penalty(tokens, free_tokens=100, max_tokens=200) == pytest.approx(penalty)


@pytest.mark.parametrize(("frames", "cost"), [(0, 0), (8, -0.125), (64, -1), (65, -1)])
def test_the_cost_of_frames_grows_evenly_to_full(frames: int, cost: float) -> None:
    assert frame_cost(frames, max_frames=64) == pytest.approx(cost)


def long_play(tokens: int, frames: int) -> Trajectory:
    """Two turns that say `tokens` in all; an overview of 3 frames and a zoom of `frames`."""
    refs = tuple(FrameRef("v", "v.mp4", 0, t / 2, 28, 28, "bicubic", "av", "00") for t in range(frames + 3))

    def shown(part: tuple[FrameRef, ...]) -> TokenContext:
        return TokenContext((7,) * len(part), ((1, 2, 2),) * len(part), part, pad_id=7)

    played = make_trajectory("B", GOOD)
    first, last = played.turns
    first = replace(
        first, action=ExternalAction(first.text, (1,) * (tokens - tokens // 2)), observation=shown(refs[3:])
    )
    last = replace(last, action=ExternalAction(last.text, (1,) * (tokens // 2)))
    return replace(played, prompt=shown(refs[:3]), turns=(first, last))


def test_costs_are_logged_apart_and_weighed() -> None:
    config = RewardConfig(
        length_penalty=0.5,
        length_free_tokens=100,
        length_full_tokens=200,
        frame_cost=0.2,
        frame_cost_full_frames=16,
    )
    parts = score_episode(long_play(tokens=150, frames=8), TASK, config)
    assert parts.extra == pytest.approx({"length": -0.5, "frames": -0.5})
    assert parts.total == pytest.approx(1.5 - 0.5 * 0.5 - 0.2 * 0.5)
    assert (parts.accuracy, parts.format, parts.tool) == (1, 1, 1)


def test_they_are_off_by_default_and_each_is_switched_on_alone() -> None:
    played = long_play(tokens=10_000, frames=16)
    assert score_episode(played, TASK, RewardConfig()).extra == {}
    assert score_episode(played, TASK, RewardConfig()).total == 1.5
    assert score_episode(played, TASK, RewardConfig(length_penalty=1.0)).extra == {"length": -1.0}
    assert score_episode(played, TASK, RewardConfig(frame_cost=1.0)).extra == {"frames": -0.25}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": -0.1}, r"reward\.length is -0.1"),
        ({"frames": float("nan")}, r"reward\.frames is nan"),
        ({"frames_full": 0}, r"reward\.frames_full is 0"),
        ({"length_free": 4096}, r"reward\.length_free is 4096; it must lie between 0 and .* \(4096\)"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**values)  # type: ignore[arg-type]
