"""Order, files and resume of ablation stages."""

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
from vz_ray.monitoring.run_dir import record_stage_time
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

COLD_START_KINDS = [StageKind.EXEMPLARS, StageKind.REFLECT, StageKind.REFLECTIONS]


def stages_of_seed(plan: list[AblationStage], seed: int) -> list[tuple[str, StageKind]]:
    return [(stage.variant, stage.kind) for stage in plan if stage.seed == seed]


def test_each_variant_runs_once_per_seed() -> None:
    plan = plan_stages([4, 7], VARIANTS)
    assert len(plan) == len(set(plan)) == 2 * (3 + 1 + 4 * 2)
    for seed in (4, 7):
        stages = stages_of_seed(plan, seed)
        cold_start = [("cold_start", kind) for kind in COLD_START_KINDS]
        assert stages[:4] == [*cold_start, ("without_rl", StageKind.EVALUATE)]
        for variant in VARIANTS:
            training = [] if variant == "without_rl" else [StageKind.RL]
            assert [kind for name, kind in stages if name == variant] == [*training, StageKind.EVALUATE]


def test_engines_restart_once_per_seed() -> None:
    pays_tool_reward = [
        s.variant != "without_tool_reward" for s in plan_stages([0, 1, 2, 3], VARIANTS) if s.kind is StageKind.RL
    ]
    assert sum(first != second for first, second in pairwise(pays_tool_reward)) == 4


def test_unselected_variants_are_skipped() -> None:
    stages = stages_of_seed(plan_stages([0], ["full", "without_reflection"]), 0)
    assert {name for name, _ in stages} == {"cold_start", "full", "without_reflection"}


def test_initial_model_of_each_variant(tmp_path: Path) -> None:
    layout = AblationLayout(tmp_path, Path("base"))
    cold = tmp_path / "seed2/cold_start/models"
    starts = {variant: layout.initial_model(2, variant) for variant in VARIANTS}
    assert starts == {
        "full": cold / "reflections",
        "without_rl": cold / "reflections",
        "without_tool_reward": cold / "reflections",
        "without_reflection": cold / "exemplars",
        "without_cold_start": Path("base"),
    }
    assert layout.evaluated_model(2, "without_rl") == cold / "reflections"
    assert layout.evaluated_model(2, "full") == tmp_path / "seed2/full/models/rl"


def make_result(task: str, status: EpisodeStatus = EpisodeStatus.ANSWERED) -> EvalResult:
    parts = RewardParts(1.0, 1.0, 1.0, 0.0)
    trajectory = Trajectory(EpisodeId(0, task, 0), "w", TokenContext(()), (), status, reward=parts)
    return EvalResult(Task(task, "v.mp4", "?", "A"), trajectory)


def write_stage_output(layout: AblationLayout, stage: AblationStage, questions: int) -> None:
    seed, variant = stage.seed, stage.variant
    if stage.kind is StageKind.EVALUATE:
        log = EvalLog(layout.eval_results(seed, variant), {"model": variant})
        for number in range(questions):
            log.append(make_result(f"t{number}"))
    elif stage.kind is StageKind.REFLECT:
        append_records(layout.reflections(seed), [])
    else:
        output = (
            layout.evaluated_model(seed, variant)
            if stage.kind is StageKind.RL
            else layout.cold_start_model(seed, stage.kind)
        )
        output.mkdir(parents=True)


def test_resume_skips_finished_stages_only(tmp_path: Path) -> None:
    layout, plan = AblationLayout(tmp_path, Path("base")), plan_stages([0, 1], VARIANTS)
    for number, stage in enumerate(plan):
        assert [s for s in plan if not layout.is_done(s, 3)] == plan[number:]
        write_stage_output(layout, stage, 3)
    assert all(layout.is_done(stage, 3) for stage in plan)


def test_incomplete_evaluation_is_not_done(tmp_path: Path) -> None:
    layout, stage = AblationLayout(tmp_path, Path("base")), AblationStage(0, "full", StageKind.EVALUATE)
    write_stage_output(layout, stage, 2)
    log = EvalLog(layout.eval_results(0, "full"), {"model": "full"})
    log.append(make_result("t2", EpisodeStatus.FAILED))
    assert not layout.is_done(stage, 3)
    log.append(make_result("t2"))
    assert layout.is_done(stage, 3)


def test_remaining_time_uses_measured_or_default(tmp_path: Path) -> None:
    layout, plan = AblationLayout(tmp_path, Path("base")), plan_stages([0, 1], VARIANTS)
    assert estimate_remaining_s(plan, {}) == 2 * (
        sum(DEFAULT_STAGE_SECONDS[kind] for kind in COLD_START_KINDS) + 4 * 400 + 5 * 130
    )
    record_stage_time(layout.run_dir(0, "full"), "rl", 100.0)
    record_stage_time(layout.run_dir(0, "full"), "rl", 50.0)
    record_stage_time(layout.run_dir(0, "without_reflection"), "rl", 250.0)
    measured = measure_stage_seconds(layout, [stage for stage in plan if stage.seed == 0])
    assert measured == {StageKind.RL: 200.0}
    assert (
        estimate_remaining_s(
            [AblationStage(1, "full", StageKind.RL), AblationStage(1, "full", StageKind.EVALUATE)], measured
        )
        == 330.0
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_config_changes_only_its_component(tmp_path: Path, variant: str) -> None:
    config = load_config(AblationConfig, "conf/ablation.yaml")
    variant_config = make_variant_config(config, 2, variant, tmp_path / "seed2" / variant)
    assert (variant_config.seed, variant_config.name, variant_config.runs) == (
        2,
        variant,
        str(tmp_path / "seed2"),
    )
    assert variant_config.reward.tool == (0.0 if variant == "without_tool_reward" else 0.5)
    assert config.reward.tool == 0.5
    for section in ("train", "learner", "cold_start"):
        assert getattr(variant_config, section) == getattr(config, section)
