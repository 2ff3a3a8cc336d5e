"""Timeouts that follow from the plan; explicit values and minimums."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vz_ray.config import load_config
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.load import to_yaml
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.config.timeouts import PLANNED_TIMEOUTS, TimeoutsConfig
from vz_ray.families import load_model_shape
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.timeouts import SAFETY_FACTOR, TimeoutRunConfig, apply_timeouts, minimum_timeouts, plan_timeouts
from vz_ray.utils.errors import UserError

SHAPE = load_model_shape("Qwen2.5-VL-7B")


def recipe(*overrides: str) -> GrpoRunConfig:
    return load_config(GrpoRunConfig, "conf/videozoomer-7b-rl-split.yaml", ["model=Qwen2.5-VL-7B", *overrides])


def seconds(config: TimeoutRunConfig, assumptions: Assumptions | None = None) -> dict[str, float]:
    return {
        timeout.key: timeout.seconds for timeout in plan_timeouts(config, assumptions or Assumptions(), shape=SHAPE)
    }


def test_7b_turn_and_learner_exceed_the_minimums() -> None:
    timeouts = seconds(recipe())
    # One turn of 4,096 tokens at full concurrency took 245 s by a simpler estimate.
    assert 2 * 245 < timeouts["turn_s"] < 1200
    assert timeouts["learner_call_s"] > PLANNED_TIMEOUTS["learner_call_s"]
    assert timeouts["episode_s"] == 5 * (timeouts["turn_s"] + 60)
    assert timeouts["publish_s"] == PLANNED_TIMEOUTS["publish_s"]


@pytest.mark.parametrize("key", sorted(PLANNED_TIMEOUTS))
def test_explicit_value_wins(key: str) -> None:
    [timeout] = [
        timeout for timeout in plan_timeouts(recipe(f"timeouts.{key}=211"), Assumptions()) if timeout.key == key
    ]
    assert (timeout.seconds, timeout.reason) == (211, "set in the config")


def test_episode_follows_an_explicit_turn() -> None:
    assert seconds(recipe("timeouts.turn_s=700"))["episode_s"] == 5 * 760


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("episode.max_turn_tokens=8192", "turn_s"),
        ("rollout.max_concurrent_episodes=128", "turn_s"),
        ("learner.world_size=4", "learner_call_s"),
        ("learner.offload=all", "learner_call_s"),
        ("train.batch_size=256", "learner_call_s"),
    ],
)
def test_timeout_grows_with_its_causes(override: str, key: str) -> None:
    assert seconds(recipe(override))[key] > seconds(recipe())[key]


def test_slower_gpus_and_links_lengthen_timeouts() -> None:
    fast, elastic = Assumptions(), recipe("rollout.max_workers=32")
    assert seconds(recipe(), replace(fast, memory_gbps=1000.0))["turn_s"] > seconds(recipe())["turn_s"]
    # 32 workers that read 16.6 GB from one node.
    slow = seconds(elastic, replace(fast, network_gbps=1.0))["publish_s"]
    assert slow == pytest.approx(SAFETY_FACTOR * 32 * 2 * SHAPE.parameters / 1e9, abs=1)


def test_run_has_only_the_timeouts_it_uses() -> None:
    sft = load_config(SftRunConfig, "conf/videozoomer-7b-sft.yaml", ["model=m", "data=d"])
    assert list(seconds(sft)) == ["learner_call_s"]
    evaluation = load_config(EvalRunConfig, None, ["model=m", "benchmarks={mlvu: {annotations: x}}"])
    assert list(seconds(evaluation)) == ["engine_start_s", "turn_s", "episode_s"]


def test_laptop_timeouts_are_not_below_the_minimums() -> None:
    config = load_config(GrpoRunConfig, "conf/laptop.yaml")
    for timeouts in (plan_timeouts(config, Assumptions()), minimum_timeouts(config, "CPU")):
        assert {timeout.key for timeout in timeouts} == set(PLANNED_TIMEOUTS)
        assert all(timeout.seconds >= PLANNED_TIMEOUTS[timeout.key] for timeout in timeouts)


def test_sections_have_minimums_until_the_plan_is_applied() -> None:
    config = recipe("timeouts.publish_s=500")
    assert (config.rollout.turn_timeout_s, config.learner.timeout_s, config.weights.timeout_s) == (300, 3600, 500)
    written = to_yaml(config)
    apply_timeouts(config, plan_timeouts(config, Assumptions()))
    assert config.rollout.turn_timeout_s == config.timeouts.turn_s == seconds(recipe())["turn_s"]
    assert config.rollout.episode_timeout_s == config.timeouts.episode_s
    assert config.learner.timeout_s == config.timeouts.learner_call_s
    assert config.weights.timeout_s == 500
    # A resumed run compares its config with the file that was written before the plan.
    assert "turn_s: null" in written


def test_score_limit_without_turn_timeout_is_twice_the_minimum() -> None:
    assert TimeoutsConfig(score_s=600).turn_s is None
    with pytest.raises(ValueError, match=r"score_s is 601; it must be at most twice turn_s \(300\)"):
        TimeoutsConfig(score_s=601)


def test_unknown_model_cannot_be_planned() -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        plan_timeouts(recipe("model=unknown"), Assumptions())
