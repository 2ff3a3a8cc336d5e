"""Faster HF Qwen-VL vision tower for hundreds of small images, with the same weights and results.

HF's attention layers loop over images (or windows) in Python, index tables are built image by image, and the
patch projection is a 3D convolution. Here, windows of equal length share one batched attention, tables are
cached per grid, and the projection is one matrix product.
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

# Transformers passes the packed sequence and its boundaries only to attention functions whose name contains
# "flash".
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
    """Compute attention within each segment of a packed sequence, batched by segment length.

    Args:
        query: `[1, heads, P, d]`; `key` and `value` have the same shape.
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
    parts = [_attend(q[rows], k[rows], v[rows], length, scaling) for rows, length in zip(order, distinct, strict=True)]
    back = torch.cat(order).argsort()
    return torch.cat(parts)[back][None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, length: int, scaling: float) -> Tensor:
    """Attention within consecutive blocks of `length` rows; all tensors are `[n * length, heads, d]`."""
    q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


class PatchProjection(nn.Module):
    """Replacement of the patch embedding's convolution, whose kernel and stride equal the patch."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        if conv.bias is not None:
            raise ValueError(
                "the patch embedding of the vision tower has a bias; only towers without one are supported"
            )
        self.weight = conv.weight

    def forward(self, patches: Tensor) -> Tensor:
        """`[P, channels, time, side, side] -> [P, hidden]`."""
        return functional.linear(patches.flatten(1), self.weight.flatten(1))


def optimize_vision_tower(visual: Any) -> None:
    """Optimize an HF Qwen2-VL or Qwen2.5-VL vision tower in place; weight names do not change."""
    from transformers import AttentionInterface

    AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
    visual.config._attn_implementation = GROUPED_ATTENTION
    visual.patch_embed.proj = PatchProjection(visual.patch_embed.proj)


def vision_tables(grids: NDArray[np.int64], visual: Any, device: torch.device) -> dict[str, Tensor | int]:
    """Return the index tables of a batch of images, arguments of the tower's forward.

    Args:
        grids: `[N, 3]` patch grids.
        visual: HF vision tower.
    """
    merge = visual.spatial_merge_size
    window = getattr(visual, "window_size", 0) // merge // visual.patch_size
    per_image = [_tables_of_grid((int(t), int(h), int(w)), merge, window) for t, h, w in grids]
    token_offsets = np.cumsum([0, *(len(order) for _, order, _ in per_image)])
    window_lengths = np.concatenate([lengths for _, _, lengths in per_image]) * merge**2
    image_lengths = grids.prod(axis=1)
    arrays: dict[str, NDArray[Any]] = {
        "position_ids": np.concatenate([positions for positions, _, _ in per_image]),
        "cu_seqlens": np.cumsum([0, *image_lengths]).astype(np.int32),
    }
    tables: dict[str, Tensor | int] = {"max_seqlen": int(image_lengths.max())}
    if window:
        window_index = [order + offset for (_, order, _), offset in zip(per_image, token_offsets, strict=False)]
        arrays["window_index"] = np.concatenate(window_index)
        arrays["cu_window_seqlens"] = np.cumsum([0, *window_lengths]).astype(np.int32)
        tables["max_window_seqlen"] = int(window_lengths.max())
    return tables | {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


@lru_cache(maxsize=1024)
def _tables_of_grid(grid: Grid, merge: int, window: int) -> tuple[NDArray[np.int64], ...]:
    """Return the tables of one image.

    Returns:
        Patch positions `[P, 2]`, order of visual tokens by window `[U]`, window lengths `[W]`.
    """
    _, height, width = grid
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    positions = np.stack([axis.reshape(blocks).swapaxes(1, 2).ravel() for axis in (rows, columns)], axis=-1)
    token_rows, token_columns = height // merge, width // merge
    if not window:
        num_tokens = token_rows * token_columns
        return positions, np.arange(num_tokens), np.asarray([num_tokens])
    window_row, window_column = np.meshgrid(
        np.arange(token_rows) // window, np.arange(token_columns) // window, indexing="ij"
    )
    window_of_token = (window_row * (token_columns // window + 1) + window_column).ravel()
    _, lengths = np.unique(window_of_token, return_counts=True)
    return positions, np.argsort(window_of_token, kind="stable"), lengths
