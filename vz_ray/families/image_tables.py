"""Index tables of the vision towers, computed once per patch grid."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vz_ray.families.family import Tables

Grid = tuple[int, int, int]


def position_tables(grids: NDArray[np.int64], merge: int) -> Tables:
    """Return row and column of each patch, and the boundaries of images, in which all patches attend.

    Args:
        grids: `[N, 3]` patch grids.
        merge: Patches per side of one visual token; the patches of a token are adjacent.
    """
    lengths = grids.prod(axis=1)
    return {
        "position_ids": np.concatenate([patch_positions(_as_grid(grid), merge) for grid in grids]),
        "cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32),
        "max_seqlen": int(lengths.max()),
    }


def window_tables(grids: NDArray[np.int64], merge: int, window: int) -> Tables:
    """Return the order of visual tokens by window, and the boundaries of windows.

    Args:
        grids: `[N, 3]` patch grids.
        merge: Patches per side of one visual token.
        window: Side of a window in visual tokens.
    """
    per_image = [_windows(_as_grid(grid), merge, window) for grid in grids]
    offsets = np.cumsum([0, *(len(order) for order, _ in per_image)])
    lengths = np.concatenate([lengths for _, lengths in per_image]) * merge**2
    return {
        "window_index": np.concatenate(
            [order + offset for (order, _), offset in zip(per_image, offsets, strict=False)]
        ),
        "cu_window_seqlens": np.cumsum([0, *lengths]).astype(np.int32),
        "max_window_seqlen": int(lengths.max()),
    }


def interpolation_tables(grids: NDArray[np.int64], merge: int, table_side: int) -> Tables:
    """Return indices and weights that interpolate a square table of position embeddings, `[P, 4]` each.

    Bilinear, with the corners of table and image aligned.

    Args:
        grids: `[N, 3]` patch grids.
        merge: Patches per side of one visual token.
        table_side: Side of the table.
    """
    per_image = [_interpolation(_as_grid(grid), merge, table_side) for grid in grids]
    return {
        "interp_indices": np.concatenate([indices for indices, _ in per_image]),
        "interp_weights": np.concatenate([weights for _, weights in per_image]),
    }


def _as_grid(grid: NDArray[np.int64]) -> Grid:
    return int(grid[0]), int(grid[1]), int(grid[2])


@lru_cache(maxsize=1024)
def patch_positions(grid: Grid, merge: int) -> NDArray[np.int64]:
    """Return row and column of each patch of an image, `[P, 2]`, token by token."""
    _, height, width = grid
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    return np.stack([axis.reshape(blocks).swapaxes(1, 2).ravel() for axis in (rows, columns)], axis=-1)


@lru_cache(maxsize=1024)
def _windows(grid: Grid, merge: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the order of visual tokens by window `[U]`, and window lengths `[W]` in visual tokens."""
    rows, columns = grid[1] // merge, grid[2] // merge
    window_row, window_column = np.meshgrid(np.arange(rows) // window, np.arange(columns) // window, indexing="ij")
    window_of_token = (window_row * (columns // window + 1) + window_column).ravel()
    _, lengths = np.unique(window_of_token, return_counts=True)
    return np.argsort(window_of_token, kind="stable"), lengths


@lru_cache(maxsize=1024)
def _interpolation(grid: Grid, merge: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return table indices and weights of each patch of an image, `[P, 4]` each."""
    positions = patch_positions(grid, merge)
    axes = [_axis_interpolation(positions[:, axis], grid[1 + axis], side) for axis in (0, 1)]
    (row_taps, row_weights), (column_taps, column_weights) = axes
    indices = row_taps[:, :, None] * side + column_taps[:, None, :]
    weights: NDArray[Any] = row_weights[:, :, None] * column_weights[:, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4)


def _axis_interpolation(
    index: NDArray[np.int64], size: int, side: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the two nearest entries of an axis of the table and their weights, `[P, 2]` each."""
    # In float32 and in this order of operations, as in transformers: equal rounding.
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    taps = floor.astype(np.int64)[:, None] + np.arange(2)
    distance = np.abs((source - floor)[:, None] - np.arange(2, dtype=np.float32))
    return np.clip(taps, 0, side - 1), np.clip(1 - distance, 0, None).astype(np.float32)
