"""Frame grid and area bounds from the files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.families.checkpoint_files import QWEN2_5_VL_PROCESSOR, QWEN3_VL_PROCESSOR, SIZES, write_checkpoint
from vz_ray.families import FAMILIES, ImageProcessorSettings
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.utils.errors import UserError
from vz_ray.video.errors import VideoLimitExceededError
from vz_ray.video.frame_scaling import target_size
from vz_ray.video.image_grid import ImageGrid

QWEN3_VL = FAMILIES["qwen3_vl"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "processor",
    [
        QWEN2_5_VL_PROCESSOR,
        QWEN3_VL_PROCESSOR,
        QWEN2_5_VL_PROCESSOR | {"size": {"shortest_edge": 784, "longest_edge": 7840}},
        QWEN3_VL_PROCESSOR | {"min_pixels": None, "max_pixels": None},
        QWEN3_VL_PROCESSOR | {"max_pixels": 131_072},
    ],
)
def test_settings_equal_those_of_the_learners_processor(tmp_path: Path, processor: dict, nested: bool) -> None:
    directory = write_checkpoint(tmp_path, "qwen3_vl", processor, nested=nested)
    settings, spec = ImageProcessorSettings.load(directory, QWEN3_VL), ImageSpec.from_pretrained(directory)
    assert settings.grid == ImageGrid(spec.patch_size, spec.merge_size)
    assert (settings.min_pixels, settings.max_pixels) == (spec.min_pixels, spec.max_pixels)


def test_nested_settings_take_precedence(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_vl", QWEN2_5_VL_PROCESSOR)
    directory = write_checkpoint(tmp_path, "qwen3_vl", QWEN3_VL_PROCESSOR, nested=True)
    assert (
        ImageProcessorSettings.load(directory, QWEN3_VL).grid.side
        == 32
        == 2 * ImageSpec.from_pretrained(directory).patch_size
    )


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (None, "Qwen3-VL: model .* has no image processor .* video processor is not enough"),
        (SIZES, "Qwen3-VL: min_pixels in .*preprocessor_config.json is None"),
        (QWEN3_VL_PROCESSOR | {"merge_size": None}, "Qwen3-VL: merge_size in .* is None; it must be a positive"),
        (QWEN3_VL_PROCESSOR | {"merge_size": 4}, "merge_size in .* is 4, and vision_config.spatial_merge_size .* is 2"),
    ],
)
def test_missing_or_contradictory_settings_are_rejected(tmp_path: Path, processor: dict | None, message: str) -> None:
    directory = write_checkpoint(tmp_path, "qwen3_vl", processor)
    with pytest.raises(UserError, match=message) as error:
        ImageProcessorSettings.load(directory, QWEN3_VL)
    assert "\n" not in str(error.value)


def test_invalid_json_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, "qwen3_vl", QWEN3_VL_PROCESSOR)
    (directory / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config\.json is not valid JSON"):
        ImageProcessorSettings.load(directory, QWEN3_VL)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((784, 784), "no area of 32x32 visual tokens is between them. Set episode.min_pixels=65536"),
        ((25_088, 100_352), "resize frames below 65536 .* Set episode.min_pixels=65536 and episode.max_pixels=100352"),
        ((65_536, 20_000_000), "Set episode.min_pixels=65536 and episode.max_pixels=16777216"),
        ((65_537, 66_000), "Set episode.min_pixels=66560 and episode.max_pixels=66560"),
    ],
)
def test_unsuitable_bounds_are_rejected_with_suitable_ones(bounds: tuple[int, int], message: str) -> None:
    settings = ImageProcessorSettings("Qwen3-VL", ImageGrid(16, 2), 65_536, 16_777_216)
    with pytest.raises(UserError, match=message) as error:
        settings.check_bounds(*bounds)
    assert str(error.value).startswith(f"Qwen3-VL: episode.min_pixels is {bounds[0]} and episode.max_pixels is ")
    assert "\n" not in str(error.value)


@given(
    st.sampled_from([(14, 784, 12_845_056), (16, 1024, 16_777_216), (16, 65_536, 16_777_216)]),
    st.integers(1, 400_000),
    st.integers(1, 400_000),
)
def test_suggested_bounds_are_accepted(processor: tuple[int, int, int], low: int, span: int) -> None:
    patch_size, min_pixels, max_pixels = processor
    settings = ImageProcessorSettings("family", ImageGrid(patch_size, 2), min_pixels, max_pixels)
    try:
        settings.check_bounds(low, low + span)
    except UserError as error:
        words = str(error).rstrip(".").replace("=", " ").split()
        settings.check_bounds(int(words[-4]), int(words[-1]))


@given(
    st.sampled_from([14, 16]),
    st.integers(16, 4000),
    st.integers(16, 4000),
    st.integers(1, 200),
    st.integers(0, 400),
)
def test_decoder_engine_and_learner_agree_on_the_grid(
    patch_size: int, width: int, height: int, min_tokens: int, more_tokens: int
) -> None:
    """Decoded size -> patch grid -> visual tokens -> the learner's grid, for grids of 28 and 32 pixels."""
    grid = ImageGrid(patch_size, merge_size=2)
    bounds = min_tokens * grid.side**2, (2 * min_tokens + more_tokens) * grid.side**2
    try:
        frame_width, frame_height = target_size(width, height, grid.frame_size(*bounds))
    except (VideoLimitExceededError, ValueError):
        return  # too elongated
    patches = grid.patch_grid(frame_height, frame_width)
    spec = ImageSpec(patch_size, 2, 2, (0.0,) * 3, (1.0,) * 3, *bounds)
    assert spec.grid(frame_height, frame_width) == patches
    tokens = grid.num_visual_tokens(patches)
    assert tokens * grid.side**2 == frame_width * frame_height
    assert bounds[0] <= frame_width * frame_height <= bounds[1]


def test_frame_off_the_grid_is_rejected() -> None:
    with pytest.raises(ValueError, match="the frame size is 56x28; it must be a multiple of 32 px"):
        ImageGrid(16, 2).patch_grid(height=28, width=56)


@pytest.mark.parametrize(("family", "side"), [("qwen2_5_vl", 28), ("qwen3_vl", 32), ("qwen3_5", 32)])
def test_known_shapes_have_the_familys_grid(family: str, side: int) -> None:
    for shape in FAMILIES[family].known_shapes.values():
        assert ImageGrid(shape.vision.patch_size, shape.vision.merge_size).side == side


def test_shipped_base_suits_the_shipped_configs() -> None:
    directory = Path("assets/tiny-base")
    settings = ImageProcessorSettings.load(directory, FAMILIES["qwen2_5_vl"])
    content = json.loads((directory / "processor_config.json").read_text())["image_processor"]
    assert settings.grid == ImageGrid(content["patch_size"], content["merge_size"])
    settings.check_bounds(784, 784)
    settings.check_bounds(25_088, 100_352)
