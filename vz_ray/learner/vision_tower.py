"""Makes HF's Qwen-VL vision tower quick for hundreds of small images; same weights, same results.

As it comes, each attention layer loops over images (or windows) in Python,
the index tables are built image by image, and the patch projection is a
three-dimensional convolution. Here windows of equal length go through one
batched attention, tables are cached per grid, and the projection is one
matrix product.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vz_ray.env.trajectory import Grid

# Transformers hands the whole packed sequence and its boundaries only to
# attention functions whose name says that they are of the "flash" kind.
GROUPED_ATTENTION = "flash_attention_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention within each segment of a packed sequence, segments of one length at a time.

    Args:
        query: `[1, heads, P, d]`, as are `key` and `value`.
        cu_seq_lens_q: `[S + 1]` segment boundaries.

    Returns:
        `[1, P, heads, d]` and None (no attention weights).
    """
    lengths = cu_seq_lens_q.diff()
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    distinct = lengths.unique().tolist()
    if len(distinct) == 1:
        return _attend(q, k, v, distinct[0], scaling)[None], None
    segment_of_row = torch.repeat_interleave(lengths, lengths)
    order = [torch.nonzero(segment_of_row == length).squeeze(1) for length in distinct]
    parts = [
        _attend(q[rows], k[rows], v[rows], length, scaling)
        for rows, length in zip(order, distinct, strict=True)
    ]
    back = torch.cat(order).argsort()
    return torch.cat(parts)[back][None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, length: int, scaling: float) -> Tensor:
    """`[n * length, heads, d]` each; attention within every run of `length` rows."""
    q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


class PatchProjection(nn.Module):
    """Takes the place of the patch embedding's convolution: kernel and stride cover the whole patch."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        if conv.bias is not None:
            raise ValueError("this vision tower's patch embedding has a bias, which Qwen-VL's has not")
        self.weight = conv.weight

    def forward(self, patches: Tensor) -> Tensor:
        """`[P, channels, time, side, side] -> [P, hidden]`."""
        return functional.linear(patches.flatten(1), self.weight.flatten(1))


def optimize_vision_tower(visual: Any) -> None:
    """Rebuilds a HF Qwen2-VL or Qwen2.5-VL vision tower in place; names of weights stay as they are."""
    from transformers import AttentionInterface

    AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
    visual.config._attn_implementation = GROUPED_ATTENTION
    visual.patch_embed.proj = PatchProjection(visual.patch_embed.proj)


def vision_tables(grids: NDArray[np.int64], visual: Any, device: torch.device) -> dict[str, Tensor | int]:
    """Index tables of a batch of images, as the tower's forward takes them.

    Args:
        grids: `[N, 3]` patch grids.
        visual: The vision tower.
    """
    merge = visual.spatial_merge_size
    window = getattr(visual, "window_size", 0) // merge // visual.patch_size
    each = [_tables_of_grid((int(t), int(h), int(w)), merge, window) for t, h, w in grids]
    units = np.cumsum([0, *(len(order) for _, order, _ in each)])
    lengths = np.concatenate([lengths for _, _, lengths in each]) * merge**2
    images = grids.prod(axis=1)
    arrays: dict[str, NDArray[Any]] = {
        "position_ids": np.concatenate([places for places, _, _ in each]),
        "cu_seqlens": np.cumsum([0, *images]).astype(np.int32),
    }
    tables: dict[str, Tensor | int] = {"max_seqlen": int(images.max())}
    if window:
        shifted = [order + start for (_, order, _), start in zip(each, units, strict=False)]
        arrays["window_index"] = np.concatenate(shifted)
        arrays["cu_window_seqlens"] = np.cumsum([0, *lengths]).astype(np.int32)
        tables["max_window_seqlen"] = int(lengths.max())
    return tables | {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


@lru_cache(maxsize=1024)
def _tables_of_grid(grid: Grid, merge: int, window: int) -> tuple[NDArray[np.int64], ...]:
    """Of one image: patch places `[P, 2]`, order of visual tokens by window `[U]`, window lengths `[W]`."""
    _, height, width = grid
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    places = np.stack([a.reshape(blocks).swapaxes(1, 2).ravel() for a in (rows, columns)], axis=-1)
    h, w = height // merge, width // merge
    if not window:
        return places, np.arange(h * w), np.asarray([h * w])
    down, across = np.meshgrid(np.arange(h) // window, np.arange(w) // window, indexing="ij")
    window_of = (down * (w // window + 1) + across).ravel()
    _, lengths = np.unique(window_of, return_counts=True)
    return places, np.argsort(window_of, kind="stable"), lengths
