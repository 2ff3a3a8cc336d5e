"""Faster HF Qwen-VL vision tower for hundreds of small images, with the same weights and results.

HF's attention layers loop over images (or windows) in Python, index tables are built image by image, and the
patch projection is a 3D convolution. Here, windows of equal length share one batched attention, tables are
cached per grid, and the projection is one matrix product.

Many frames pass the tower in slices. A trained tower then keeps only the pixels of a slice and recomputes it in
the backward pass, so that memory does not grow with the number of frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vz_ray.families import FAMILIES, ModelShape

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
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, patches: Tensor) -> Tensor:
        """`[P, channels, time, side, side] -> [P, hidden]`."""
        return functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def optimize_vision_tower(visual: Any) -> None:
    """Optimize an HF vision tower of the Qwen-VL families in place; weight names do not change."""
    from transformers import AttentionInterface

    AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
    visual.config._attn_implementation = GROUPED_ATTENTION
    visual.patch_embed.proj = PatchProjection(visual.patch_embed.proj)


def vision_tables(grids: NDArray[np.int64], shape: ModelShape, device: torch.device) -> dict[str, Tensor | int]:
    """Return the index tables of a batch of images, arguments of the tower's forward.

    Args:
        grids: `[N, 3]` patch grids.
        shape: Shape of the model.
    """
    tables = FAMILIES[shape.model_type].image_tables(grids, shape.vision)
    return {
        name: table if isinstance(table, int) else torch.from_numpy(table).to(device) for name, table in tables.items()
    }


def slice_frames(grids: NDArray[np.int64], max_patches: int) -> list[slice]:
    """Split frames into consecutive slices of at most `max_patches` patches; a larger frame is a slice of its own.

    Args:
        grids: `[N, 3]` patch grids.
        max_patches: 0 returns one slice.
    """
    slices, start, patches = [], 0, 0
    for index, count in enumerate(grids.prod(axis=1).tolist()):
        if max_patches and index > start and patches + count > max_patches:
            slices.append(slice(start, index))
            start, patches = index, 0
        patches += count
    return [*slices, slice(start, len(grids))]


def compute_features(visual: Any, pixels: Tensor, grids: NDArray[np.int64], shape: ModelShape) -> Tensor:
    """Return the features of frames, `[visual tokens, levels * H]`: the merger's, then those of deepstack.

    Args:
        pixels: `[P, patch elements]`.
        grids: `[N, 3]` patch grids.
    """
    tables = vision_tables(grids, shape, pixels.device)
    output = visual(pixels.to(visual.dtype), grid_thw=torch.from_numpy(grids), **tables)
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    return torch.cat(levels, dim=-1) if len(levels) > 1 else levels[0]


def compute_features_in_slices(
    visual: Any,
    pixels: Tensor,
    grids: NDArray[np.int64],
    shape: ModelShape,
    max_patches: int,
    common_count: Callable[[int], int] = int,
) -> Tensor:
    """Return `compute_features` of all frames, at most `max_patches` patches at a time; see `slice_frames`.

    Args:
        common_count: Returns the number of passes that all ranks make, given this rank's. ZeRO-3 gathers weights in
            every pass, so that ranks with fewer slices add passes of a blank frame.
    """
    slices = slice_frames(grids, max_patches)
    num_passes = common_count(len(slices))
    if num_passes == 1:
        return compute_features(visual, pixels, grids, shape)
    starts = np.cumsum([0, *grids.prod(axis=1)])
    inputs = [(pixels[starts[part.start] : starts[part.stop]], grids[part]) for part in slices]
    blank = np.array([[1, shape.vision.merge_size, shape.vision.merge_size]])
    inputs += [(pixels.new_zeros(int(blank.prod()), pixels.shape[1]), blank)] * (num_passes - len(slices))
    features = [
        checkpoint(compute_features, visual, *part, shape, use_reentrant=False, preserve_rng_state=False)
        for part in inputs
    ]
    computed = torch.cat(features[: len(slices)])
    for unused in features[len(slices) :]:
        computed = computed + 0.0 * unused.sum()
    return computed
