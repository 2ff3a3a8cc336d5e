"""Sizes of the model against the model itself, which transformers builds without memory for weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.config.qwen_3b import PARAMETERS as PARAMETERS_3B
from tests.config.qwen_3b import architecture as architecture_3b
from tests.config.qwen_7b import PARAMETERS, VISION_PARAMETERS, architecture
from tests.plan.making import on_meta
from vz_ray.observe.errors import UserError
from vz_ray.plan.shape import KNOWN, PROCESSOR_PIXELS, ModelShape, processor_pixels, shape_of

TINY = Path("assets/tiny-base")


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "make"), [("Qwen2.5-VL-3B", architecture_3b), ("Qwen2.5-VL-7B", architecture)]
)
def test_a_known_shape_is_that_of_its_config_and_counts_every_weight(name: str, make: Any) -> None:
    config = make()
    shape = ModelShape.of_config(config)
    assert shape == KNOWN[name] == shape_of(f"models/{name}-Instruct")
    model = on_meta(config)
    assert shape.parameters == count(model)
    assert shape.vision.parameters == count(model.model.visual)


def test_the_released_checkpoints_have_as_many_weights() -> None:
    assert KNOWN["Qwen2.5-VL-7B"].parameters == PARAMETERS
    assert KNOWN["Qwen2.5-VL-7B"].vision.parameters == VISION_PARAMETERS
    assert KNOWN["Qwen2.5-VL-3B"].parameters == PARAMETERS_3B


def test_a_directory_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    shape = shape_of(str(tmp_path))
    from safetensors import safe_open

    with safe_open(TINY / "model.safetensors", framework="np") as stored:
        sizes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    from math import prod

    assert shape.parameters == sum(prod(size) for size in sizes)
    assert processor_pixels(str(TINY)) == 100_352
    assert processor_pixels(str(tmp_path)) == processor_pixels("") == PROCESSOR_PIXELS


@pytest.mark.parametrize(("model", "said"), [("", "it is not set"), ("/models/mine", "no config.json")])
def test_an_unknown_model_is_an_error_that_names_known_ones(model: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"{said}.*model=Qwen2\.5-VL-7B"):
        shape_of(model)


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(UserError, match="qwen2_vl"):
        shape_of(str(tmp_path))
