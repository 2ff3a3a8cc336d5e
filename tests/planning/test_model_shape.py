"""Model shapes against HF models on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.config.qwen_3b import PARAMETERS as PARAMETERS_3B
from tests.config.qwen_3b import architecture as architecture_3b
from tests.config.qwen_7b import PARAMETERS, VISION_PARAMETERS, architecture
from tests.planning.pass_memory import build_on_meta
from vz_ray.planning.model_shape import (
    DEFAULT_MAX_PIXELS,
    KNOWN_SHAPES,
    ModelShape,
    load_model_shape,
    processor_max_pixels,
)
from vz_ray.utils.errors import UserError

TINY = Path("assets/tiny-base")


def count_params(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "make"), [("Qwen2.5-VL-3B", architecture_3b), ("Qwen2.5-VL-7B", architecture)])
def test_known_shape_matches_config_and_parameters(name: str, make: Any) -> None:
    config = make()
    shape = ModelShape.from_hf_config(config)
    assert shape == KNOWN_SHAPES[name] == load_model_shape(f"models/{name}-Instruct")
    model = build_on_meta(config)
    assert shape.parameters == count_params(model)
    assert shape.vision.parameters == count_params(model.model.visual)


def test_parameters_match_released_checkpoints() -> None:
    assert KNOWN_SHAPES["Qwen2.5-VL-7B"].parameters == PARAMETERS
    assert KNOWN_SHAPES["Qwen2.5-VL-7B"].vision.parameters == VISION_PARAMETERS
    assert KNOWN_SHAPES["Qwen2.5-VL-3B"].parameters == PARAMETERS_3B


def test_shape_loads_from_config_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    shape = load_model_shape(str(tmp_path))
    from safetensors import safe_open

    with safe_open(TINY / "model.safetensors", framework="np") as stored:
        sizes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    from math import prod

    assert shape.parameters == sum(prod(size) for size in sizes)
    assert processor_max_pixels(str(TINY)) == 100_352
    assert processor_max_pixels(str(tmp_path)) == processor_max_pixels("") == DEFAULT_MAX_PIXELS


@pytest.mark.parametrize(("model", "message"), [("", "model is not set"), ("/models/mine", "no config.json")])
def test_unknown_model_raises_with_known_names(model: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"{message}.*model=Qwen2\.5-VL-7B"):
        load_model_shape(model)


def test_other_model_family_raises(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(UserError, match="qwen2_vl"):
        load_model_shape(str(tmp_path))
