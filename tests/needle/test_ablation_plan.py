"""What an ablation does, in which order, and what it leaves out when it is gone on with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from vz_ray.config import load_config
from vz_ray.config.ablation import VARIANTS, AblationConfig
from vz_ray.data.episode_record import append_records
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, RewardParts, TokenContext, Trajectory
from vz_ray.eval.eval_log import EvalLog, EvalResult
from vz_ray.monitoring.stage_times import record_stage_time
from vz_ray.needle.ablation_plan import (
    DEFAULT_STAGE_SECONDS,
    AblationLayout,
    AblationStage,
    StageKind,
    estimate_remaining_s,
    measure_stage_seconds,
    plan_stages,
)
from vz_ray.needle.ablation_runner import make_variant_config

COLD = [StageKind.EXEMPLARS, StageKind.REFLECT, StageKind.REFLECTIONS]


def parts(plan: list[AblationStage], seed: int) -> list[tuple[str, StageKind]]:
    return [(stage.variant, stage.kind) for stage in plan if stage.seed == seed]


def test_every_variant_is_trained_and_evaluated_once_a_seed_after_what_it_starts_from() -> None:
    plan = plan_stages([4, 7], VARIANTS)
    assert len(plan) == len(set(plan)) == 2 * (3 + 1 + 4 * 2)
    for seed in (4, 7):
        own = parts(plan, seed)
        assert own[:4] == [*(("cold_start", part) for part in COLD), ("without_rl", StageKind.EVALUATE)]
        for variant in VARIANTS:
            trained = [] if variant == "without_rl" else [StageKind.RL]
            assert [part for name, part in own if name == variant] == [*trained, StageKind.EVALUATE]


def test_the_engines_change_what_they_pay_once_a_seed() -> None:
    paid = [
        s.variant != "without_tool_reward"
        for s in plan_stages([0, 1, 2, 3], VARIANTS)
        if s.kind is StageKind.RL
    ]
    assert sum(one != other for one, other in pairwise(paid)) == 4


def test_variants_that_were_not_asked_for_are_left_out() -> None:
    own = parts(plan_stages([0], ["full", "without_reflection"]), 0)
    assert {name for name, _ in own} == {"cold_start", "full", "without_reflection"}


def test_each_variant_starts_from_its_own_model(tmp_path: Path) -> None:
    tree = AblationLayout(tmp_path, Path("base"))
    cold = tmp_path / "seed2/cold_start/models"
    starts = {variant: tree.initial_model(2, variant) for variant in VARIANTS}
    assert starts == {
        "full": cold / "reflections",
        "without_rl": cold / "reflections",
        "without_tool_reward": cold / "reflections",
        "without_reflection": cold / "exemplars",
        "without_cold_start": Path("base"),
    }
    assert tree.evaluated_model(2, "without_rl") == cold / "reflections"
    assert tree.evaluated_model(2, "full") == tmp_path / "seed2/full/models/rl"


def answer(task: str, status: EpisodeStatus = EpisodeStatus.ANSWERED) -> EvalResult:
    parts = RewardParts(1.0, 1.0, 1.0, 0.0)
    played = Trajectory(EpisodeId(0, task, 0), "w", TokenContext(()), (), status, reward=parts)
    return EvalResult(Task(task, "v.mp4", "?", "A"), played)


def make(tree: AblationLayout, stage: AblationStage, questions: int) -> None:
    """What a stage leaves when it is done."""
    seed, variant = stage.seed, stage.variant
    if stage.kind is StageKind.EVALUATE:
        log = EvalLog(tree.eval_results(seed, variant), {"model": variant})
        for number in range(questions):
            log.append(answer(f"t{number}"))
    elif stage.kind is StageKind.REFLECT:
        append_records(tree.reflections(seed), [])
    else:
        product = (
            tree.evaluated_model(seed, variant)
            if stage.kind is StageKind.RL
            else tree.cold_start_model(seed, stage.kind)
        )
        product.mkdir(parents=True)


def test_wherever_it_stops_what_is_done_is_left_out_and_nothing_else(tmp_path: Path) -> None:
    tree, plan = AblationLayout(tmp_path, Path("base")), plan_stages([0, 1], VARIANTS)
    for number, stage in enumerate(plan):
        assert [s for s in plan if not tree.is_done(s, 3)] == plan[number:]
        make(tree, stage, 3)
    assert all(tree.is_done(stage, 3) for stage in plan)


def test_an_evaluation_that_lacks_answers_or_has_failed_ones_is_not_done(tmp_path: Path) -> None:
    tree, stage = AblationLayout(tmp_path, Path("base")), AblationStage(0, "full", StageKind.EVALUATE)
    make(tree, stage, 2)
    log = EvalLog(tree.eval_results(0, "full"), {"model": "full"})
    log.append(answer("t2", EpisodeStatus.FAILED))
    assert not tree.is_done(stage, 3)
    log.append(answer("t2"))
    assert tree.is_done(stage, 3)


def test_the_time_left_is_what_was_measured_and_else_what_is_usual(tmp_path: Path) -> None:
    tree, plan = AblationLayout(tmp_path, Path("base")), plan_stages([0, 1], VARIANTS)
    assert estimate_remaining_s(plan, {}) == 2 * (
        sum(DEFAULT_STAGE_SECONDS[part] for part in COLD) + 4 * 400 + 5 * 130
    )
    record_stage_time(tree.run_dir(0, "full"), "rl", 100.0)
    record_stage_time(tree.run_dir(0, "full"), "rl", 50.0)
    record_stage_time(tree.run_dir(0, "without_reflection"), "rl", 250.0)
    measured = measure_stage_seconds(tree, [stage for stage in plan if stage.seed == 0])
    assert measured == {StageKind.RL: 200.0}
    assert (
        estimate_remaining_s(
            [AblationStage(1, "full", StageKind.RL), AblationStage(1, "full", StageKind.EVALUATE)], measured
        )
        == 330.0
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_s_run_has_its_seed_and_differs_in_what_it_does_without(
    tmp_path: Path, variant: str
) -> None:
    config = load_config(AblationConfig, "conf/ablation.yaml")
    own = make_variant_config(config, 2, variant, tmp_path / "seed2" / variant)
    assert (own.seed, own.name, own.runs) == (2, variant, str(tmp_path / "seed2"))
    assert own.reward.tool == (0.0 if variant == "without_tool_reward" else 0.5)
    assert config.reward.tool == 0.5
    assert (own.train, own.learner, own.cold_start) == (config.train, config.learner, config.cold_start)
