"""Config of on-policy distillation: which teachers a student accepts, and the keys that follow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vz_ray.config import load_config
from vz_ray.config.fields import InvalidValueError
from vz_ray.config.load import ConfigError
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.teacher import check_shared_tokens
from vz_ray.utils.resources import find_resource

STUDENT = find_resource("assets/tiny-base")


def load(*overrides: str) -> GrpoRunConfig:
    return load_config(GrpoRunConfig, None, ["model=assets/tiny-base", *overrides])


def test_teacher_of_another_family_is_refused_with_both_values() -> None:
    with pytest.raises(ConfigError) as caught:
        load("teacher.model=assets/tiny-qwen3_vl")
    message = str(caught.value)
    assert message.startswith("override 'teacher.model=assets/tiny-qwen3_vl': teacher.model is ")
    assert "assets/tiny-qwen3_vl' and model is " in message
    assert "vision_config.patch_size in config.json is 16 for the teacher and 14 for the student" in message


def copy_with(directory: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy the student's tokenizer and config, with a changed JSON file."""
    directory.mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(STUDENT / file, directory)
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))
    return directory


def swap_ids(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


CHANGES = {
    "swapped ids": ("tokenizer.json", swap_ids, r"the id of token '.+' in tokenizer\.json is \d+ for the teacher and"),
    "further token": (
        "tokenizer.json",
        lambda tokenizer: tokenizer["added_tokens"].append({"content": "<new>", "id": 9999}),
        r"the id of token '<new>' in tokenizer\.json is 9999 for the teacher and missing for the student",
    ),
    "image token": (
        "config.json",
        lambda config: config.update(image_token_id=3),
        r"image_token_id in config\.json is 3 for the teacher and \d+ for the student",
    ),
    "merge size": (
        "config.json",
        lambda config: config["vision_config"].update(spatial_merge_size=4),
        r"vision_config\.spatial_merge_size in config\.json is 4 for the teacher and 2 for the student",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_different_tokens_are_refused(tmp_path: Path, name: str) -> None:
    file, change, message = CHANGES[name]
    teacher = copy_with(tmp_path / "teacher", file, change)
    with pytest.raises(InvalidValueError, match=message):
        check_shared_tokens(STUDENT, teacher)


def test_same_tokens_are_accepted_whatever_the_size(tmp_path: Path) -> None:
    teacher = copy_with(
        tmp_path / "teacher", "config.json", lambda config: config["text_config"].update(vocab_size=4096)
    )
    # The same vocabulary in another layout of the file.
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    assert load(f"teacher.model={teacher}").teacher.enabled


def test_unreadable_teacher_is_refused(tmp_path: Path) -> None:
    teacher = copy_with(tmp_path / "teacher", "config.json", lambda config: None)
    (teacher / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match=r"teacher\.model cannot be compared with model: cannot read .*tokenizer\.json"
    ):
        load(f"teacher.model={teacher}")


def test_loss_follows_the_teacher() -> None:
    settings = ["teacher.kl_coef=0.5", "teacher.kl_cap=4", "teacher.reward_weight=0"]
    loss = load("teacher.model=assets/tiny-base", *settings, "train.group_size=1").learner.loss
    assert (loss.teacher_coef, loss.teacher_kl_cap, loss.reward_weight) == (0.5, 4.0, 0.0)
    without = load(*settings).learner.loss
    assert (without.teacher_coef, without.reward_weight) == (0.0, 1.0)


def test_teacher_workers_follow_timeouts_and_episode() -> None:
    teacher = load("timeouts.turn_s=400", "timeouts.episode_s=4000", "episode.max_context=1000").teacher
    assert (teacher.turn_timeout_s, teacher.episode_timeout_s) == (400, 4000)
    assert teacher.engine.max_model_len == 1000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.group_size=1"], r"train\.group_size is 1; it must be at least 2.*teacher\.reward_weight=0"),
        (["train.group_size=1", "teacher.model=assets/tiny-base"], r"train\.group_size is 1; it must be at least 2"),
        (
            [
                "teacher.model=assets/tiny-base",
                "teacher.reward_weight=0",
                "learner.loss.turn_credit=shaped",
                "reward.turns.valid_zoom=1",
            ],
            r"turn_credit is 'shaped' and teacher\.reward_weight is 0; it has no effect",
        ),
        (["teacher.kl_coef=0"], r"teacher\.kl_coef is 0\.0; it must be finite and above 0"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*overrides)
