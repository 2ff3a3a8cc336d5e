"""Patches equal the checkpoint's own image processor, and nothing is resized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.learner.training_data import small_model
from vz_ray.learner.image_patches import ImageSpec, extract_patches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("sizes", [[(28, 28)], [(28, 28), (56, 84), (28, 28), (112, 28)], [(252, 392)]])
def test_patches_equal_the_processor_bit_for_bit(model: Path, sizes: list[tuple[int, int]]) -> None:
    from transformers import AutoImageProcessor

    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, size=(h, w, 3), dtype=np.uint8) for h, w in sizes]
    theirs = AutoImageProcessor.from_pretrained(model)(images=frames, return_tensors="pt")
    rows, grids = extract_patches(frames, ImageSpec.from_pretrained(model))
    assert torch.equal(rows, theirs["pixel_values"])
    assert np.array_equal(grids, theirs["image_grid_thw"].numpy())


@pytest.mark.parametrize(("height", "width"), [(30, 28), (28, 14), (28 * 20, 28 * 20)])
def test_a_frame_that_would_be_resized_is_refused(model: Path, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"a frame has {width}x{height} pixels; its sides must be"):
        ImageSpec.from_pretrained(model).grid(height, width)
