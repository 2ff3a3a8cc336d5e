"""Conversion of RGB frames to the patch rows of Qwen-VL's vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vz_ray.env.trajectory import Grid
from vz_ray.video.frame import RGB


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Settings of a checkpoint's image processor, for frames that need no resize.

    Attributes:
        patch_size: Side of a patch in pixels.
        temporal_patch_size: Repetitions of an image along the time axis of a patch.
        merge_size: Patches per side of one visual token.
        image_mean: Mean per channel on the 0..1 scale.
        image_std: Standard deviation per channel on the 0..1 scale.
        min_pixels: Minimum area; the processor enlarges smaller frames.
        max_pixels: Maximum area; the processor shrinks larger frames.
        rescale_factor: Factor from 0..255 to 0..1.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    rescale_factor: float = 1 / 255

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ImageSpec:
        """Read the settings from an HF checkpoint directory."""
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=False)
        return cls(
            patch_size=processor.patch_size,
            temporal_patch_size=processor.temporal_patch_size,
            merge_size=processor.merge_size,
            image_mean=tuple(processor.image_mean),
            image_std=tuple(processor.image_std),
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
            rescale_factor=processor.rescale_factor,
        )

    def without_size_limits(self) -> ImageSpec:
        """Return a copy without bounds on the area, for blank frames."""
        return replace(self, min_pixels=0, max_pixels=1 << 40)

    def grid(self, height: int, width: int) -> Grid:
        """Return the patch grid of a frame of this size.

        Raises:
            ValueError: The processor would resize the frame; engine and learner would get different pixels.
        """
        factor = self.patch_size * self.merge_size
        area = height * width
        if height % factor or width % factor or not self.min_pixels <= area <= self.max_pixels:
            raise ValueError(
                f"a frame has {width}x{height} pixels; its sides must be multiples of {factor} and its area "
                f"{self.min_pixels} to {self.max_pixels} pixels, or the model's processor would resize it. "
                "Decode frames at their final size."
            )
        return (1, height // self.patch_size, width // self.patch_size)


def extract_patches(frames: Sequence[RGB], spec: ImageSpec) -> tuple[Tensor, NDArray[np.int64]]:
    """Compute the patch rows of `Qwen2VLImageProcessor`, bit for bit.

    Args:
        frames: N arrays `uint8 [h, w, 3]`, sizes may differ.

    Returns:
        Patch rows of all frames in order, `float32 [P, 3 * temporal * patch * patch]`, and grids
        `int64 [N, 3]`.
    """
    grids = [spec.grid(*frame.shape[:2]) for frame in frames]
    rows = [grid[1] * grid[2] for grid in grids]
    out = torch.empty(sum(rows), 3 * spec.temporal_patch_size * spec.patch_size**2)
    starts = np.cumsum([0, *rows])
    for grid in dict.fromkeys(grids):
        same_size = [i for i, other in enumerate(grids) if other == grid]
        patches = _patches_of_one_size(np.stack([frames[i] for i in same_size]), grid, spec)
        if len(same_size) == len(frames):
            return patches.reshape(out.shape), np.asarray(grids, dtype=np.int64)
        for i, rows_of_frame in zip(same_size, patches, strict=True):
            out[starts[i] : starts[i + 1]] = rows_of_frame
    return out, np.asarray(grids, dtype=np.int64).reshape(-1, 3)


def _patches_of_one_size(stack: NDArray[np.uint8], grid: Grid, spec: ImageSpec) -> Tensor:
    """`uint8 [N, h, w, 3]` to `float32 [N, rows, 3 * temporal * patch * patch]`."""
    n, p, m = len(stack), spec.patch_size, spec.merge_size
    images = torch.from_numpy(stack).permute(0, 3, 1, 2).to(torch.float32)
    # As in the processor, mean and std are scaled to 0..255 rather than pixels to 0..1: equal rounding.
    scale = 1.0 / spec.rescale_factor
    mean, std = (torch.tensor(values) * scale for values in (spec.image_mean, spec.image_std))
    images = images.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
    blocks = images.reshape(n, 3, grid[1] // m, m, p, grid[2] // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    repeated = blocks.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, spec.temporal_patch_size, -1, -1)
    return repeated.reshape(n, grid[1] * grid[2], -1)
