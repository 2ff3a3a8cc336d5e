"""Every shipped recipe loads, plans and fits; the RL recipes are what the planner recommends."""

from __future__ import annotations

from pathlib import Path

import pytest

from vz_ray.config.run import GrpoRunConfig
from vz_ray.families import FAMILIES
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.plan_report import PlanReport, make_report, plan_to_json
from vz_ray.planning.planner import load_plannable_config, make_plan

MODELS = {
    "videozoomer-7b": "Qwen2.5-VL-7B",
    "qwen3-vl-8b": "Qwen3-VL-8B",
    "qwen3-vl-4b": "Qwen3-VL-4B",
    "qwen3-vl-30b-a3b": "Qwen3-VL-30B-A3B",
    "qwen3.5-4b": "Qwen3.5-4B",
}
"""Model of each recipe, by the start of its name."""
RECIPES = sorted(path for name in MODELS for path in Path("conf").glob(f"{name}-*.yaml"))
GPUS = {
    "videozoomer-7b-rl": 16,
    "videozoomer-7b-rl-8gpu": 8,
    "videozoomer-7b-rl-1gpu": 1,
    "qwen3-vl-8b-rl": 16,
    "qwen3-vl-8b-768frames-rl": 16,
    "qwen3-vl-30b-a3b-rl": 16,
    "qwen3-vl-4b-rl": 8,
    "qwen3.5-4b-rl": 8,
}
"""Recipes that use their GPUs as the planner recommends."""
MAX_STEP_S = 600.0


def report(path: Path) -> PlanReport:
    model = next(model for name, model in MODELS.items() if path.stem.startswith(name))
    return make_report(load_plannable_config(path, [f"model={model}"]), Assumptions())


def test_each_family_has_recipes() -> None:
    with_recipes = {
        family.model_type for family in FAMILIES.values() for model in family.known_shapes if model in MODELS.values()
    }
    assert with_recipes == FAMILIES.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_80_gib(path: Path) -> None:
    result = report(path)
    assert result.plan.fits, [footprint.bytes_over for footprint in result.plan.footprints]
    assert result.plan.engine is None or result.plan.engine.can_start
    assert not result.advice
    assert plan_to_json(result)["timeouts"]


@pytest.mark.parametrize("name", GPUS)
def test_recipe_is_what_the_planner_recommends(name: str) -> None:
    path = Path(f"conf/{name}.yaml")
    config, steps = load_plannable_config(path, []), report(path).steps
    assert isinstance(config, GrpoRunConfig)
    assert steps is not None
    assert steps.num_gpus == GPUS[name]
    assert config.train.colocate
    assert steps.recommended is steps.configured, steps.reason


@pytest.mark.parametrize("name", ["videozoomer-7b-rl", "qwen3-vl-8b-rl"])
def test_step_on_16_gpus_takes_at_most_ten_minutes(name: str) -> None:
    steps = report(Path(f"conf/{name}.yaml")).steps
    assert steps is not None
    assert steps.configured.seconds <= MAX_STEP_S


def test_recipe_of_768_frames_needs_shared_sequences_and_slices() -> None:
    path, model = Path("conf/qwen3-vl-8b-768frames-rl.yaml"), "model=Qwen3-VL-8B"
    plan = make_plan(load_plannable_config(path, [model]), Assumptions())
    assert (plan.longest.overview_frames, plan.longest.zoom_frames, plan.longest.frame.tokens) == (768, 64, 128)
    # A group is one sequence, so that its overview is computed once.
    assert plan.branches_per_sequence == (16,)
    for setting in ("learner.sequence_parallel_size=2", "learner.vision_slice_patches=0 learner.mlp_tile_tokens=0"):
        assert not make_plan(load_plannable_config(path, [model, *setting.split()]), Assumptions()).fits, setting


def test_separate_gpus_take_longer() -> None:
    split = report(Path("conf/videozoomer-7b-rl-split.yaml")).steps
    assert split is not None
    assert split.configured.seconds > MAX_STEP_S


def test_names_of_recipes_are_distinct() -> None:
    names = [load_plannable_config(path, []).name for path in RECIPES if path.stem != "videozoomer-7b-rl-split"]
    assert len(set(names)) == len(names)
