"""The simulation behind the sizing guide, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from benchmarks.simulated import Machine, Shape, World, papers_shapes, rollout
from benchmarks.sizing import best_of, plan, splits

# A token a millisecond however many are sampled; prompts cost nothing; decoding a second for everything.
CLOCK = Machine(params=1e9, vision_params=0.0, kv_bytes=0.0, flops=inf, bandwidth=2e12, decode_share=1.0)
ONE = World((Shape((100,), ()),), tasks=1, samples=1, zoom_cpu_s=1.0, overview_cpu_s=1.0)


def seconds(world: World, engines: int = 1, decoders: int = 1) -> float:
    return rollout(world, CLOCK, engines, decoders).seconds


def test_an_episode_takes_its_overview_its_turns_and_its_clips() -> None:
    assert seconds(ONE) == pytest.approx(1.1, abs=1e-4)
    zooming = replace(ONE, shapes=(Shape((100, 50, 20), (8, 8)),))
    assert seconds(zooming) == pytest.approx(1.0 + 0.1 + 1.0 + 0.05 + 1.0 + 0.02, abs=1e-4)


def test_samples_of_a_task_share_an_overview_and_sample_together() -> None:
    assert seconds(replace(ONE, samples=8)) == pytest.approx(1.1, abs=1e-4)


def test_overviews_of_tasks_queue_up_in_front_of_one_decoder() -> None:
    assert seconds(replace(ONE, tasks=4)) == pytest.approx(4.1, abs=1e-4)
    assert seconds(replace(ONE, tasks=4), decoders=4) == pytest.approx(1.1, abs=1e-4)


def test_an_engine_without_a_place_makes_tasks_wait() -> None:
    crowded = replace(ONE, tasks=3, samples=2, places=2)
    assert seconds(crowded, decoders=3) == pytest.approx(3 * 1.1, abs=1e-4)
    assert seconds(crowded, engines=3, decoders=3) == pytest.approx(1.1, abs=1e-4)


def test_reading_a_prompt_costs_its_arithmetic_once_for_a_task() -> None:
    world = replace(ONE, samples=4, overview=10, frame_tokens=100, text_tokens=50, overview_cpu_s=0.0)
    slow = Machine(
        params=1e9,
        vision_params=0.0,
        kv_bytes=0.0,
        flops=1e12,
        bandwidth=2e12,
        decode_share=1.0,
        prefill_mfu=1.0,
    )
    # Four tokens at once take 8 ms of arithmetic there, and their weights 1 ms of reading.
    assert rollout(world, slow, 1, 1).seconds == pytest.approx(
        2 * 1e9 * world.prefix / 1e12 + 100 * 0.008, rel=1e-3
    )


def test_what_the_learner_sees_is_counted_whole() -> None:
    world = replace(ONE, shapes=(Shape((100, 50), (8,)),), tasks=2, samples=3)
    expected = 6 * (world.prefix + 150 + 60 + 8 * (world.frame_tokens + 12))
    assert rollout(world, CLOCK, 1, 1).tokens == expected


def test_the_papers_episodes_zoom_twice() -> None:
    zooms = [len(shape.clips) for shape in papers_shapes()]
    assert sum(zooms) / len(zooms) == pytest.approx(2, abs=0.1)
    assert all(len(shape.turns) == len(shape.clips) + 1 for shape in papers_shapes())


def test_the_plan_has_no_more_decoders_than_help_and_adds_up() -> None:
    world = World(papers_shapes(200), tasks=8, samples=4)
    plans = [plan(world, Machine(), 8, engines) for engines in (2, 4, 6)]
    for one in plans:
        assert one.engines + one.ranks == 8
        assert one.sync_s == pytest.approx(one.rollout.seconds + one.learn_s + 3.0)
        assert one.async_s <= one.sync_s
        free = rollout(world, Machine(), one.engines, 4096).seconds
        assert one.rollout.seconds <= 1.05 * free
    assert best_of(plans, in_turns=True).sync_s == min(one.sync_s for one in plans)
    assert splits(16) == [2, 4, 6, 8, 10, 12, 14]
    assert splits(4) == [1, 2, 3]
