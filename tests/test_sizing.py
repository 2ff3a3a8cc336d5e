"""Cluster simulation against hand-computed times."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from benchmarks.cluster_simulation import (
    EpisodeShape,
    GpuModel,
    SimulationConfig,
    paper_episode_shapes,
    simulate_rollout,
)
from benchmarks.sizing import RECIPES, best_split, candidate_splits, plan_split, time_recipes

# One token per millisecond at any batch size, free prefill, one second per decoded clip.
SIMPLE_GPU = GpuModel(params=1e9, vision_params=0.0, kv_bytes=0.0, flops=inf, bandwidth=2e12, decode_share=1.0)
ONE_EPISODE = SimulationConfig(
    (EpisodeShape((100,), ()),), batch_size=1, group_size=1, zoom_cpu_s=1.0, overview_cpu_s=1.0
)


def rollout_seconds(config: SimulationConfig, engines: int = 1, decoders: int = 1) -> float:
    return simulate_rollout(config, SIMPLE_GPU, engines, decoders).seconds


def test_episode_time_is_overview_plus_turns_plus_clips() -> None:
    assert rollout_seconds(ONE_EPISODE) == pytest.approx(1.1, abs=1e-4)
    zooming = replace(ONE_EPISODE, episode_shapes=(EpisodeShape((100, 50, 20), (8, 8)),))
    assert rollout_seconds(zooming) == pytest.approx(1.0 + 0.1 + 1.0 + 0.05 + 1.0 + 0.02, abs=1e-4)


def test_group_shares_overview_and_samples_concurrently() -> None:
    assert rollout_seconds(replace(ONE_EPISODE, group_size=8)) == pytest.approx(1.1, abs=1e-4)


def test_overviews_queue_for_one_decoder() -> None:
    assert rollout_seconds(replace(ONE_EPISODE, batch_size=4)) == pytest.approx(4.1, abs=1e-4)
    assert rollout_seconds(replace(ONE_EPISODE, batch_size=4), decoders=4) == pytest.approx(1.1, abs=1e-4)


def test_tasks_wait_for_a_full_engine() -> None:
    crowded = replace(ONE_EPISODE, batch_size=3, group_size=2, max_concurrent_episodes=2)
    assert rollout_seconds(crowded, decoders=3) == pytest.approx(3 * 1.1, abs=1e-4)
    assert rollout_seconds(crowded, engines=3, decoders=3) == pytest.approx(1.1, abs=1e-4)


def test_prefix_is_prefilled_once_per_group() -> None:
    config = replace(
        ONE_EPISODE, group_size=4, overview_frames=10, frame_tokens=100, text_tokens=50, overview_cpu_s=0.0
    )
    slow = GpuModel(
        params=1e9,
        vision_params=0.0,
        kv_bytes=0.0,
        flops=1e12,
        bandwidth=2e12,
        decode_share=1.0,
        prefill_mfu=1.0,
    )
    # A batch of four tokens takes 8 ms of FLOPs and 1 ms of weight reads.
    assert simulate_rollout(config, slow, 1, 1).seconds == pytest.approx(
        2 * 1e9 * config.prefix_tokens / 1e12 + 100 * 0.008, rel=1e-3
    )


def test_tokens_count_whole_trajectories() -> None:
    config = replace(ONE_EPISODE, episode_shapes=(EpisodeShape((100, 50), (8,)),), batch_size=2, group_size=3)
    expected = 6 * (config.prefix_tokens + 150 + 60 + 8 * (config.frame_tokens + 12))
    assert simulate_rollout(config, SIMPLE_GPU, 1, 1).tokens == expected


def test_paper_shapes_have_two_zooms_on_average() -> None:
    zooms = [len(shape.clip_frames) for shape in paper_episode_shapes()]
    assert sum(zooms) / len(zooms) == pytest.approx(2, abs=0.1)
    assert all(len(shape.turn_tokens) == len(shape.clip_frames) + 1 for shape in paper_episode_shapes())


def test_split_limits_decoders_and_adds_up() -> None:
    config = SimulationConfig(paper_episode_shapes(200), batch_size=8, group_size=4)
    splits = [plan_split(config, GpuModel(), 8, engines) for engines in (2, 4, 6)]
    for split in splits:
        assert split.engines + split.ranks == 8
        assert split.sync_s == pytest.approx(split.rollout.seconds + split.learn_s + 3.0)
        assert split.async_s <= split.sync_s
        minimum = simulate_rollout(config, GpuModel(), split.engines, 4096).seconds
        assert split.rollout.seconds <= 1.05 * minimum
    assert best_split(splits, synchronous=True).sync_s == min(split.sync_s for split in splits)
    assert candidate_splits(16) == [2, 4, 6, 8, 10, 12, 14]
    assert candidate_splits(4) == [1, 2, 3]


def test_shipped_recipe_takes_at_most_ten_minutes_with_simulated_rollout() -> None:
    steps = time_recipes()
    assert len(steps) == 1 + len(RECIPES)
    before, rl, split = (step.seconds for step in steps[:3])
    assert rl <= 600 < split < before
