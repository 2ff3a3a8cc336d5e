"""What an ablation does, in which order, and what it leaves out when it is gone on with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from vz_ray.ablate import config_of
from vz_ray.ablation_plan import EXPECTED_S, Part, Stage, Tree, left_s, stages, timed
from vz_ray.config import load
from vz_ray.config.ablate import VARIANTS, AblateConfig
from vz_ray.data.record import append_records
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Context, EpisodeId, RewardParts, Status, Trajectory
from vz_ray.evaluate.results import EvalLog, EvalResult
from vz_ray.evaluate.summary import record_stage

COLD = [Part.EXEMPLARS, Part.REFLECT, Part.REFLECTIONS]


def parts(plan: list[Stage], seed: int) -> list[tuple[str, Part]]:
    return [(stage.variant, stage.part) for stage in plan if stage.seed == seed]


def test_every_variant_is_trained_and_evaluated_once_a_seed_after_what_it_starts_from() -> None:
    plan = stages([4, 7], VARIANTS)
    assert len(plan) == len(set(plan)) == 2 * (3 + 1 + 4 * 2)
    for seed in (4, 7):
        own = parts(plan, seed)
        assert own[:4] == [*(("cold_start", part) for part in COLD), ("without_rl", Part.EVALUATE)]
        for variant in VARIANTS:
            trained = [] if variant == "without_rl" else [Part.RL]
            assert [part for name, part in own if name == variant] == [*trained, Part.EVALUATE]


def test_the_engines_change_what_they_pay_once_a_seed() -> None:
    paid = [s.variant != "without_tool_reward" for s in stages([0, 1, 2, 3], VARIANTS) if s.part is Part.RL]
    assert sum(one != other for one, other in pairwise(paid)) == 4


def test_variants_that_were_not_asked_for_are_left_out() -> None:
    own = parts(stages([0], ["full", "without_reflection"]), 0)
    assert {name for name, _ in own} == {"cold_start", "full", "without_reflection"}


def test_each_variant_starts_from_its_own_model(tmp_path: Path) -> None:
    tree = Tree(tmp_path, Path("base"))
    cold = tmp_path / "seed2/cold_start/models"
    starts = {variant: tree.start(2, variant) for variant in VARIANTS}
    assert starts == {
        "full": cold / "reflections",
        "without_rl": cold / "reflections",
        "without_tool_reward": cold / "reflections",
        "without_reflection": cold / "exemplars",
        "without_cold_start": Path("base"),
    }
    assert tree.trained(2, "without_rl") == cold / "reflections"
    assert tree.trained(2, "full") == tmp_path / "seed2/full/models/rl"


def answer(task: str, status: Status = Status.ANSWERED) -> EvalResult:
    parts = RewardParts(1.0, 1.0, 1.0, 0.0)
    played = Trajectory(EpisodeId(0, task, 0), "w", Context(()), (), status, reward=parts)
    return EvalResult(Task(task, "v.mp4", "?", "A"), played)


def make(tree: Tree, stage: Stage, questions: int) -> None:
    """What a stage leaves when it is done."""
    seed, variant = stage.seed, stage.variant
    if stage.part is Part.EVALUATE:
        log = EvalLog(tree.answers(seed, variant), {"model": variant})
        for number in range(questions):
            log.append(answer(f"t{number}"))
    elif stage.part is Part.REFLECT:
        append_records(tree.reflections(seed), [])
    else:
        product = tree.trained(seed, variant) if stage.part is Part.RL else tree.cold(seed, stage.part)
        product.mkdir(parents=True)


def test_wherever_it_stops_what_is_done_is_left_out_and_nothing_else(tmp_path: Path) -> None:
    tree, plan = Tree(tmp_path, Path("base")), stages([0, 1], VARIANTS)
    for number, stage in enumerate(plan):
        assert [s for s in plan if not tree.done(s, 3)] == plan[number:]
        make(tree, stage, 3)
    assert all(tree.done(stage, 3) for stage in plan)


def test_an_evaluation_that_lacks_answers_or_has_failed_ones_is_not_done(tmp_path: Path) -> None:
    tree, stage = Tree(tmp_path, Path("base")), Stage(0, "full", Part.EVALUATE)
    make(tree, stage, 2)
    log = EvalLog(tree.answers(0, "full"), {"model": "full"})
    log.append(answer("t2", Status.FAILED))
    assert not tree.done(stage, 3)
    log.append(answer("t2"))
    assert tree.done(stage, 3)


def test_the_time_left_is_what_was_measured_and_else_what_is_usual(tmp_path: Path) -> None:
    tree, plan = Tree(tmp_path, Path("base")), stages([0, 1], VARIANTS)
    assert left_s(plan, {}) == 2 * (sum(EXPECTED_S[part] for part in COLD) + 4 * 400 + 5 * 130)
    record_stage(tree.folder(0, "full"), "rl", 100.0)
    record_stage(tree.folder(0, "full"), "rl", 50.0)
    record_stage(tree.folder(0, "without_reflection"), "rl", 250.0)
    measured = timed(tree, [stage for stage in plan if stage.seed == 0])
    assert measured == {Part.RL: 200.0}
    assert left_s([Stage(1, "full", Part.RL), Stage(1, "full", Part.EVALUATE)], measured) == 330.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_s_run_has_its_seed_and_differs_in_what_it_does_without(
    tmp_path: Path, variant: str
) -> None:
    config = load(AblateConfig, "conf/ablate.yaml")
    own = config_of(config, 2, variant, tmp_path / "seed2" / variant)
    assert (own.seed, own.name, own.runs) == (2, variant, str(tmp_path / "seed2"))
    assert own.reward.tool == (0.0 if variant == "without_tool_reward" else 0.5)
    assert config.reward.tool == 0.5
    assert (own.train, own.learner, own.cold_start) == (config.train, config.learner, config.cold_start)
