"""Conversion of RGB frames to the patch rows of Qwen-VL's vision tower.

Frames travel to the device as bytes and are normalized there. A float32 patch row has eight times as many
bytes: four per value, and every image is repeated along the time axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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


def join_frames(frames: Sequence[RGB], spec: ImageSpec, *, pin: bool = False) -> tuple[Tensor, NDArray[np.int64]]:
    """Copy frames into one tensor.

    Args:
        frames: N arrays `uint8 [h, w, 3]`, sizes may differ.
        pin: Use pinned host memory, from which uploads to a GPU are asynchronous.

    Returns:
        Bytes of all frames in order, `uint8 [sum(h * w * 3)]`, and patch grids `int64 [N, 3]`.

    Raises:
        ValueError: See `ImageSpec.grid`.
    """
    grids = [spec.grid(*frame.shape[:2]) for frame in frames]
    joined = torch.empty(sum(frame.size for frame in frames), dtype=torch.uint8, pin_memory=pin)
    if frames:
        np.concatenate([frame.reshape(-1) for frame in frames], out=joined.numpy())
    return joined, np.asarray(grids, dtype=np.int64).reshape(-1, 3)


def compute_patches(joined: Tensor, grids: NDArray[np.int64], spec: ImageSpec) -> Tensor:
    """Compute the patch rows of `Qwen2VLImageProcessor` on the device of the frames; on CPU bit for bit.

    Args:
        joined: Output of `join_frames`, on any device.
        grids: `[N, 3]` patch grids.

    Returns:
        Patch rows of all frames in order, `float32 [P, 3 * temporal * patch * patch]`.
    """
    row_counts = grids.prod(axis=1)
    frames = joined.split((row_counts * 3 * spec.patch_size**2).tolist())
    by_grid: dict[Grid, list[int]] = {}
    for index, (time, rows, columns) in enumerate(grids.tolist()):
        by_grid.setdefault((time, rows, columns), []).append(index)
    if len(by_grid) == 1:
        return _patches_of_one_size(joined, next(iter(by_grid)), spec)
    width = 3 * spec.temporal_patch_size * spec.patch_size**2
    out = torch.empty(int(row_counts.sum()), width, device=joined.device)
    targets = out.split(row_counts.tolist())
    for grid, indices in by_grid.items():
        patches = _patches_of_one_size(torch.cat([frames[i] for i in indices]), grid, spec)
        for index, rows_of_frame in zip(indices, patches.chunk(len(indices)), strict=True):
            targets[index].copy_(rows_of_frame)
    return out


def extract_patches(frames: Sequence[RGB], spec: ImageSpec) -> tuple[Tensor, NDArray[np.int64]]:
    """Return the patch rows and grids of frames; see `join_frames` and `compute_patches`."""
    joined, grids = join_frames(frames, spec)
    return compute_patches(joined, grids, spec), grids


def _patches_of_one_size(joined: Tensor, grid: Grid, spec: ImageSpec) -> Tensor:
    """`uint8 [N * h * w * 3]` to `float32 [N * rows, 3 * temporal * patch * patch]`."""
    _, rows, columns = grid
    p, m = spec.patch_size, spec.merge_size
    blocks = joined.view(-1, rows // m, m, p, columns // m, m, p, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    mean, std = _mean_and_std(spec, joined.device)
    patches = blocks.contiguous().to(torch.float32).sub_(mean).div_(std)
    repeated = patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, spec.temporal_patch_size, -1, -1)
    return repeated.reshape(len(blocks) * rows * columns, -1)


@lru_cache
def _mean_and_std(spec: ImageSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation on the 0..255 scale, `[3, 1, 1]` each."""
    # As in the processor, mean and std are scaled to 0..255 rather than pixels to 0..1: equal rounding.
    scale = 1.0 / spec.rescale_factor
    mean, std = ((torch.tensor(values) * scale).view(-1, 1, 1) for values in (spec.image_mean, spec.image_std))
    return mean.to(device), std.to(device)
