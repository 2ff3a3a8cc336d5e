"""Patches against the HF image processor; frames that need a resize are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vz_ray.learner.image_patches import ImageSpec, compute_patches, extract_patches, join_frames


@pytest.mark.parametrize("sizes", [[(28, 28)], [(28, 28), (56, 84), (28, 28), (112, 28)], [(252, 392)]])
def test_patches_match_the_hf_processor_bit_for_bit(model: Path, sizes: list[tuple[int, int]]) -> None:
    from transformers import AutoImageProcessor

    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, size=(h, w, 3), dtype=np.uint8) for h, w in sizes]
    expected = AutoImageProcessor.from_pretrained(model)(images=frames, return_tensors="pt")
    rows, grids = extract_patches(frames, ImageSpec.from_pretrained(model))
    assert torch.equal(rows, expected["pixel_values"])
    assert np.array_equal(grids, expected["image_grid_thw"].numpy())


def test_frames_travel_as_bytes(model: Path, device: torch.device) -> None:
    spec = ImageSpec.from_pretrained(model)
    frames = [np.full((28, 56, 3), value, dtype=np.uint8) for value in (3, 200)]
    joined, grids = join_frames(frames, spec, pin=device.type == "cuda")
    assert joined.tolist() == [3] * frames[0].size + [200] * frames[1].size
    patches = compute_patches(joined.to(device, non_blocking=True), grids, spec)
    assert patches.nbytes == 8 * joined.nbytes
    torch.testing.assert_close(patches.cpu(), extract_patches(frames, spec)[0])


@pytest.mark.parametrize(("height", "width"), [(30, 28), (28, 14), (28 * 20, 28 * 20)])
def test_frame_that_needs_a_resize_is_refused(model: Path, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"a frame has {width}x{height} pixels; its sides must be"):
        ImageSpec.from_pretrained(model).grid(height, width)
