"""Grid of patches and visual tokens that a model family lays over a frame."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.video.frame import FrameSize

Grid = tuple[int, int, int]
"""Patch grid of one image before merging: (1, height / patch size, width / patch size)."""


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """Sizes of a checkpoint's patches and visual tokens.

    Attributes:
        patch_size: Side of a patch, pixels.
        merge_size: Patches per side of one visual token.

    Example:
        >>> ImageGrid(patch_size=16, merge_size=2).patch_grid(height=64, width=96)
        (1, 4, 6)
    """

    patch_size: int
    merge_size: int

    @property
    def side(self) -> int:
        """Side of one visual token in pixels. Both sides of a frame are multiples of it."""
        return self.patch_size * self.merge_size

    def patch_grid(self, height: int, width: int) -> Grid:
        """Return the patch grid of a frame of this size in pixels.

        Raises:
            ValueError: A side is not a multiple of `side`.
        """
        if height % self.side or width % self.side:
            raise ValueError(
                f"the frame size is {width}x{height}; it must be a multiple of {self.side} px. Resize it for the model."
            )
        return (1, height // self.patch_size, width // self.patch_size)

    def num_visual_tokens(self, grid: Grid) -> int:
        """Return the number of visual tokens of an image after merging."""
        return num_visual_tokens(grid, self.merge_size)

    def frame_size(self, min_pixels: int, max_pixels: int) -> FrameSize:
        """Return these bounds on the area of a frame, with sides of this grid."""
        return FrameSize(min_pixels, max_pixels, self.side)


def num_visual_tokens(grid: Grid, merge_size: int) -> int:
    """Return the number of visual tokens of an image after merging `merge_size` x `merge_size` patches."""
    return grid[0] * grid[1] * grid[2] // merge_size**2
