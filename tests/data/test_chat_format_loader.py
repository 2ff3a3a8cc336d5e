"""Chat format of a checkpoint: family, frame grid, chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.env.chat_templates import QWEN3_5, QWEN3_VL_INSTRUCT, QWEN3_VL_THINKING
from tests.families.checkpoint_files import QWEN2_5_VL_PROCESSOR, QWEN3_VL_PROCESSOR, write_checkpoint
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.chat_format_loader import check_episode_format, load_chat_format
from vz_ray.utils.errors import UserError
from vz_ray.video.image_grid import ImageGrid

BOUNDS = {"min_pixels": 65_536, "max_pixels": 131_072}


def test_qwen2_5_vl_keeps_its_defaults(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen2_5_vl", QWEN2_5_VL_PROCESSOR)
    chat_format = load_chat_format(model, EpisodeConfig())
    assert chat_format.grid == ImageGrid(14, 2)
    assert chat_format.template.frame == "<frame{number}_time{time:.2f}s>{image}"
    assert load_chat_format(model, EpisodeConfig(chat_format="compat", prompt="conf/prompt/compat.yaml")).compat


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5"])
def test_newer_families_have_their_own_grid_and_frame_text(tmp_path: Path, model_type: str) -> None:
    model = write_checkpoint(tmp_path, model_type, QWEN3_VL_PROCESSOR)
    chat_format = load_chat_format(model, EpisodeConfig(**BOUNDS))
    assert chat_format.grid == ImageGrid(16, 2)
    assert chat_format.template.frame == "<{time:.1f} seconds>{image}"


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        ({"chat_format": "compat"}, "Qwen3-VL: episode.chat_format is compat; supported: clean"),
        ({"min_pixels": 784, "max_pixels": 784}, "Qwen3-VL: episode.min_pixels is 784 and .* Set episode.min_pixels="),
        ({}, "Qwen3-VL: episode.min_pixels is 25088 .* resize frames below 65536"),
    ],
)
def test_format_of_another_family_is_rejected(tmp_path: Path, episode: dict, message: str) -> None:
    model = write_checkpoint(tmp_path, "qwen3_vl", QWEN3_VL_PROCESSOR)
    with pytest.raises(UserError, match=message) as error:
        check_episode_format(model, EpisodeConfig(**episode))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("chat_template", "thinking", "opens"),
    [
        (QWEN3_VL_INSTRUCT, "auto", False),
        (QWEN3_VL_INSTRUCT, "off", False),
        (QWEN3_VL_THINKING, "auto", True),
        (QWEN3_VL_THINKING, "on", True),
        (QWEN3_5, "on", True),
        (QWEN3_5, "off", False),
    ],
)
def test_thinking_mode_of_the_template(tmp_path: Path, chat_template: str, thinking: str, opens: bool) -> None:
    model = write_checkpoint(tmp_path, "qwen3_vl", QWEN3_VL_PROCESSOR, chat_template=chat_template)
    assert load_chat_format(model, EpisodeConfig(thinking=thinking, **BOUNDS)).opens_reasoning is opens


@pytest.mark.parametrize(
    ("chat_template", "thinking", "message"),
    [
        (QWEN3_VL_INSTRUCT, "on", "episode.thinking is on, .* never opens <think>; supported: auto, off"),
        (QWEN3_VL_THINKING, "off", "episode.thinking is off, .* always opens <think>; supported: auto, on"),
    ],
)
def test_mode_that_the_template_lacks_is_rejected(
    tmp_path: Path, chat_template: str, thinking: str, message: str
) -> None:
    model = write_checkpoint(tmp_path, "qwen3_vl", QWEN3_VL_PROCESSOR, chat_template=chat_template)
    with pytest.raises(UserError, match=f"^Qwen3-VL: {message}$"):
        load_chat_format(model, EpisodeConfig(thinking=thinking, **BOUNDS))


def test_checkpoint_without_chat_template_is_rejected(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3_vl", QWEN3_VL_PROCESSOR)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"Qwen3-VL: the tokenizer of model .* has no chat_template"):
        load_chat_format(model, EpisodeConfig(**BOUNDS))


def test_unknown_family_is_rejected(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llava", QWEN3_VL_PROCESSOR)
    with pytest.raises(UserError, match="llava"):
        load_chat_format(model, EpisodeConfig())
