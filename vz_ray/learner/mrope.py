"""Three-axis rotary positions (M-RoPE) of Qwen2.5-VL, for images at any position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def mrope_positions(ids: Ints, grids: Ints, image_token: int, merge: int) -> Ints:
    """Compute the positions of one conversation; equal to HF's `get_rope_index`.

    A text token advances all three axes by one. An image of `h x w` visual tokens that starts at position p
    has temporal position p, rows p..p+h-1 and columns p..p+w-1. The next token is at p + max(h, w).

    Args:
        ids: `[L]` expanded ids, one `image_token` per visual token.
        grids: `[N, 3]` patch grids (1, rows, columns) before merging, in order.
        image_token: Id of the image pad.
        merge: Patches per side of one visual token.

    Returns:
        `[3, L]` int64: temporal, row and column positions.

    Raises:
        ValueError: The grids do not match the number of image tokens.
    """
    slots = np.flatnonzero(ids == image_token)
    rows, columns = (grids[:, 1] // merge, grids[:, 2] // merge) if len(grids) else (_NONE, _NONE)
    counts = rows * columns
    if counts.sum() != len(slots):
        raise ValueError(f"{len(slots)} image tokens, but the {len(grids)} grids have {counts.sum()} visual tokens")
    advance = np.ones(len(ids), dtype=np.int64)
    advance[slots] = 0
    first = np.cumsum(counts) - counts
    advance[slots[first]] = np.maximum(rows, columns)
    start = np.cumsum(advance) - advance
    positions = np.broadcast_to(start, (3, len(ids))).copy()
    if len(slots):
        image = np.repeat(np.arange(len(grids)), counts)
        offset = np.arange(len(slots)) - first[image]
        base = start[slots[first]][image]
        positions[0, slots] = base
        positions[1, slots] = base + offset // columns[image]
        positions[2, slots] = base + offset % columns[image]
    return positions


_NONE: Ints = np.zeros(0, dtype=np.int64)
