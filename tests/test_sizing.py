"""The simulation behind the sizing guide, against sums done by hand."""

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
from benchmarks.sizing import best_split, candidate_splits, plan_split

# A token a millisecond however many are sampled; prompts cost nothing; decoding a second for everything.
CLOCK = GpuModel(params=1e9, vision_params=0.0, kv_bytes=0.0, flops=inf, bandwidth=2e12, decode_share=1.0)
ONE = SimulationConfig(
    (EpisodeShape((100,), ()),), batch_size=1, group_size=1, zoom_cpu_s=1.0, overview_cpu_s=1.0
)


def seconds(world: SimulationConfig, engines: int = 1, decoders: int = 1) -> float:
    return simulate_rollout(world, CLOCK, engines, decoders).seconds


def test_an_episode_takes_its_overview_its_turns_and_its_clips() -> None:
    assert seconds(ONE) == pytest.approx(1.1, abs=1e-4)
    zooming = replace(ONE, episode_shapes=(EpisodeShape((100, 50, 20), (8, 8)),))
    assert seconds(zooming) == pytest.approx(1.0 + 0.1 + 1.0 + 0.05 + 1.0 + 0.02, abs=1e-4)


def test_samples_of_a_task_share_an_overview_and_sample_together() -> None:
    assert seconds(replace(ONE, group_size=8)) == pytest.approx(1.1, abs=1e-4)


def test_overviews_of_tasks_queue_up_in_front_of_one_decoder() -> None:
    assert seconds(replace(ONE, batch_size=4)) == pytest.approx(4.1, abs=1e-4)
    assert seconds(replace(ONE, batch_size=4), decoders=4) == pytest.approx(1.1, abs=1e-4)


def test_an_engine_without_a_place_makes_tasks_wait() -> None:
    crowded = replace(ONE, batch_size=3, group_size=2, worker_nodes=2)
    assert seconds(crowded, decoders=3) == pytest.approx(3 * 1.1, abs=1e-4)
    assert seconds(crowded, engines=3, decoders=3) == pytest.approx(1.1, abs=1e-4)


def test_reading_a_prompt_costs_its_arithmetic_once_for_a_task() -> None:
    world = replace(
        ONE, group_size=4, overview_frames=10, frame_tokens=100, text_tokens=50, overview_cpu_s=0.0
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
    # Four tokens at once take 8 ms of arithmetic there, and their weights 1 ms of reading.
    assert simulate_rollout(world, slow, 1, 1).seconds == pytest.approx(
        2 * 1e9 * world.prefix / 1e12 + 100 * 0.008, rel=1e-3
    )


def test_what_the_learner_sees_is_counted_whole() -> None:
    world = replace(ONE, episode_shapes=(EpisodeShape((100, 50), (8,)),), batch_size=2, group_size=3)
    expected = 6 * (world.prefix + 150 + 60 + 8 * (world.frame_tokens + 12))
    assert simulate_rollout(world, CLOCK, 1, 1).tokens == expected


def test_the_papers_episodes_zoom_twice() -> None:
    zooms = [len(shape.clip_frames) for shape in paper_episode_shapes()]
    assert sum(zooms) / len(zooms) == pytest.approx(2, abs=0.1)
    assert all(len(shape.turn_tokens) == len(shape.clip_frames) + 1 for shape in paper_episode_shapes())


def test_the_plan_has_no_more_decoders_than_help_and_adds_up() -> None:
    world = SimulationConfig(paper_episode_shapes(200), batch_size=8, group_size=4)
    plans = [plan_split(world, GpuModel(), 8, engines) for engines in (2, 4, 6)]
    for one in plans:
        assert one.engines + one.ranks == 8
        assert one.sync_s == pytest.approx(one.rollout.seconds + one.learn_s + 3.0)
        assert one.async_s <= one.sync_s
        free = simulate_rollout(world, GpuModel(), one.engines, 4096).seconds
        assert one.rollout.seconds <= 1.05 * free
    assert best_split(plans, in_turns=True).sync_s == min(one.sync_s for one in plans)
    assert candidate_splits(16) == [2, 4, 6, 8, 10, 12, 14]
    assert candidate_splits(4) == [1, 2, 3]
