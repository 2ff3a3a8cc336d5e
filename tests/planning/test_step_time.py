"""Step times of splits and of the colocated mode, and the recommendation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cluster_simulation import GpuModel, SimulationConfig, paper_episode_shapes, simulate_rollout
from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.gpu_memory import GIB, MemoryPhase
from vz_ray.planning.learner_memory import CUDA_AND_NCCL_BYTES
from vz_ray.planning.planner import ResourcePlan, make_plan
from vz_ray.planning.step_time import PREFER_ON_POLICY, PUBLISH_OVERHEAD_S, StepPlan, StepTime, plan_steps, step_time

SPLIT = ("train.colocate=false", "weights.transport=nccl", "learner.world_size=8", "rollout.num_workers=8")
COLOCATED = ("train.colocate=true", "weights.transport=ipc", "learner.world_size=16", "rollout.num_workers=16")
H100 = Assumptions()


def make(*overrides: str, assumptions: Assumptions = H100) -> tuple[GrpoRunConfig, ResourcePlan]:
    settings = ["model=Qwen2.5-VL-7B", "train.max_staleness=0", "clips.num_actors=16", *overrides]
    config = load_config(GrpoRunConfig, "conf/videozoomer-7b-rl.yaml", settings)
    return config, make_plan(config, assumptions)


def time_of(*overrides: str) -> StepTime:
    return step_time(*make(*overrides), H100)


def steps_of(*overrides: str, assumptions: Assumptions = H100) -> StepPlan:
    return plan_steps(*make(*overrides, assumptions=assumptions), assumptions)


@pytest.mark.parametrize(("engines", "decoders"), [(2, 16), (8, 16), (16, 48)])
def test_rollout_time_agrees_with_the_simulation(engines: int, decoders: int) -> None:
    simulated = simulate_rollout(SimulationConfig(paper_episode_shapes()), GpuModel(), engines, decoders).seconds
    estimated = time_of(*SPLIT[:3], f"rollout.num_workers={engines}", f"clips.num_actors={decoders}").rollout_s
    assert estimated == pytest.approx(simulated, rel=0.15)


def test_step_in_turns_is_the_sum_of_its_phases() -> None:
    step = time_of(*SPLIT)
    assert step.mode == "in turns"
    assert step.seconds == step.rollout_s + step.learner.seconds + step.publish_s
    assert step.learner.compute_s == pytest.approx(723, abs=1)


def test_overlapping_step_is_as_long_as_its_longest_phase() -> None:
    step = time_of(*SPLIT, "train.max_staleness=1", "learner.loss.tis_cap=2.0")
    assert step.mode == "overlapping"
    assert step.seconds == max(step.rollout_s, step.learner.seconds) + step.publish_s


def test_colocated_step_uses_every_gpu_twice() -> None:
    step = time_of(*COLOCATED)
    assert (step.mode, step.engines, step.ranks) == ("colocated", 16, 16)
    assert step.switch_s > 0
    assert step.learner.compute_s == pytest.approx(time_of(*SPLIT).learner.compute_s / 2)
    assert step.seconds < time_of(*SPLIT).seconds


def test_uneven_ranks_wait_for_the_slowest() -> None:
    even, uneven = time_of(*SPLIT), time_of(*SPLIT, "learner.world_size=14")
    # 128 sequences per update: ten micro-steps on 14 ranks.
    assert uneven.learner.compute_s == pytest.approx(even.learner.compute_s * 8 / 14 * 140 / 128)


def test_offloading_and_sharding_cost_time() -> None:
    resident = time_of(*SPLIT).learner
    assert time_of(*SPLIT, "learner.offload=optimizer").learner.offload_s > resident.offload_s == 0
    assert time_of(*SPLIT, "learner.zero_stage=2").learner.communication_s < resident.communication_s
    assert time_of(*SPLIT, "learner.world_size=9").learner.communication_s > resident.communication_s


def test_every_alternative_uses_the_same_gpus_and_can_be_loaded() -> None:
    steps = steps_of(*SPLIT)
    assert steps.num_gpus == 16
    assert [step.mode for step in steps.alternatives] == ["in turns", "overlapping", "colocated"]
    for step in steps.alternatives:
        assert step.engines + step.ranks * (step.mode != "colocated") == 16
        again = time_of(*SPLIT, *step.settings)
        assert replace(again, settings=step.settings) == step
    in_turns = steps.alternatives[0]
    assert in_turns.seconds <= steps.configured.seconds


def test_fastest_on_policy_mode_is_recommended() -> None:
    steps = steps_of(*SPLIT)
    assert steps.recommended.mode == "colocated"
    assert steps.recommended.seconds <= 600
    again = steps_of(*SPLIT, *steps.recommended.settings)
    assert again.recommended is again.configured


def test_stale_tokens_are_recommended_only_for_a_large_gain() -> None:
    steps = steps_of(*SPLIT, "rollout.engine.tensor_parallel_size=2", "rollout.num_workers=4")
    assert "colocated" not in [step.mode for step in steps.alternatives]
    by_mode = {step.mode: step for step in steps.alternatives}
    saved = 1 - by_mode["overlapping"].seconds / by_mode["in turns"].seconds
    assert saved > PREFER_ON_POLICY
    assert steps.recommended is by_mode["overlapping"]
    assert f"saves {saved:.0%}" in steps.reason


def test_configuration_without_memory_is_not_recommended() -> None:
    small = replace(H100, gpu_bytes=52 * GIB)
    steps = steps_of(*SPLIT, assumptions=small)
    assert not steps.configured.fits
    assert steps.recommended.fits
    assert steps.recommended is not steps.configured
    nothing = steps_of(*SPLIT, assumptions=replace(H100, gpu_bytes=12 * GIB))
    assert nothing.recommended is nothing.configured
    assert "no use of these GPUs fits" in nothing.reason


def test_colocated_memory_is_planned_for_each_turn() -> None:
    _, split = make(*SPLIT, "learner.world_size=16")
    _, colocated = make(*COLOCATED)
    assert colocated.engine is not None
    assert split.engine is not None
    assert colocated.shared_gpu is None
    assert colocated.handover is not None
    # The engine keeps its context while it sleeps, the learner too.
    learner_bytes = colocated.learner.peak_bytes - split.learner.peak_bytes
    assert GIB < learner_bytes < 3 * GIB
    assert colocated.engine.footprint.peak_bytes - split.engine.footprint.peak_bytes == CUDA_AND_NCCL_BYTES
    states = split.learner.bytes_during(MemoryPhase.ALWAYS)
    # The engine's weights, and a sixteenth of the learner's.
    weights = 2 * colocated.shape.parameters
    assert weights * 17 / 16 < colocated.handover.peak_bytes < weights * 17 / 16 + 8 * GIB
    assert make(*COLOCATED, "train.sleep_level=1")[1].host_bytes == colocated.host_bytes + weights
    assert colocated.host_bytes - split.host_bytes == states - CUDA_AND_NCCL_BYTES


def test_published_adapters_shorten_the_publish_and_keep_weights_asleep() -> None:
    lora = ("learner.lora.rank=64", "weights.transport=shm")
    split = time_of(*SPLIT, *lora)
    merged = time_of(*SPLIT, *lora, "learner.lora.publish=merged")
    assert PUBLISH_OVERHEAD_S < split.publish_s < PUBLISH_OVERHEAD_S + (merged.publish_s - PUBLISH_OVERHEAD_S) / 20
    colocated = make(*COLOCATED, *lora)[1]
    discarding = make(*COLOCATED, *lora, "learner.lora.publish=merged")[1]
    assert colocated.host_bytes == discarding.host_bytes + 2 * colocated.shape.parameters
    assert colocated.handover is not None
    assert discarding.handover is not None
    bucket, merged_bucket = (
        next(item.bytes for item in plan.handover.items if item.name == "gathered bucket")
        for plan in (colocated, discarding)
    )
    assert bucket < merged_bucket / 100


def test_colocated_mode_without_memory_does_not_fit() -> None:
    config, plan = make(*COLOCATED, "rollout.engine.gpu_memory_utilization=0.99")
    assert plan.engine_bytes_over > 0
    assert not plan.fits
    config, plan = make(*COLOCATED, assumptions=replace(H100, gpu_bytes=40 * GIB))
    assert plan.learner_bytes_over > 0
    assert not step_time(config, plan, H100).fits
