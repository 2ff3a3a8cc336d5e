"""Recipes of Qwen3-VL and Qwen3.5: frames of the family's grid, otherwise VideoZoomer's values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.env.prompt_template import PromptTemplate
from vz_ray.families import FAMILIES, ImageProcessorSettings, load_model_shape

RECIPES = {
    "qwen3-vl-8b": "Qwen3-VL-8B",
    "qwen3-vl-4b": "Qwen3-VL-4B",
    "qwen3-vl-30b-a3b": "Qwen3-VL-30B-A3B",
    "qwen3.5-4b": "Qwen3.5-4B",
}
RELEASED_PROCESSOR = {
    "patch_size": 16,
    "merge_size": 2,
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
}
"""Image processor of the released checkpoints of both families."""


def load(name: str, stage: str) -> Any:
    return load_config(SftRunConfig if stage == "sft" else GrpoRunConfig, Path(f"conf/{name}-{stage}.yaml"))


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize(("name", "model"), RECIPES.items())
def test_frames_have_the_size_of_the_family(tmp_path: Path, name: str, model: str, stage: str) -> None:
    episode, shape = load(name, stage).episode, load_model_shape(model)
    family = FAMILIES[shape.model_type]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED_PROCESSOR))
    (tmp_path / "config.json").write_text("{}")
    ImageProcessorSettings.load(tmp_path, family).check_bounds(episode.min_pixels, episode.max_pixels)
    token_area = shape.vision.token_side**2
    # As many visual tokens as VideoZoomer's largest frame.
    assert (episode.min_pixels // token_area, episode.max_pixels // token_area) == (64, 128)
    assert episode.chat_format in family.chat_formats
    assert not PromptTemplate.load(episode.prompt).frame, "the family's text of a frame would not be used"


@pytest.mark.parametrize("name", RECIPES)
def test_both_stages_have_equal_episodes(name: str) -> None:
    assert load(name, "sft").episode == load(name, "rl").episode


@pytest.mark.parametrize("name", RECIPES)
def test_other_values_are_videozoomers(name: str) -> None:
    reference = load_config(GrpoRunConfig, Path("conf/videozoomer-7b-rl.yaml"))
    recipe = load(name, "rl")
    assert recipe.learner.loss == reference.learner.loss
    assert recipe.learner.optimizer == reference.learner.optimizer
    assert recipe.train == reference.train
    assert recipe.name == f"{name}-rl"
