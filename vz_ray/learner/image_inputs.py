"""Frames of a micro-batch: bytes of the distinct frames, and the index of each image slot's features."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vz_ray.learner.example import Ints, frame_key
from vz_ray.learner.frame_cache import FeatureCache, FrameFeatures
from vz_ray.learner.image_patches import ImageSpec, join_frames
from vz_ray.video.frame import RGB, FrameRef

PixelLoader = Callable[[Sequence[FrameRef]], Mapping[str, RGB]]
"""Returns the pixels of the given frames by digest; additional entries are ignored."""


def in_memory_pixels(pixels: Mapping[str, RGB]) -> PixelLoader:
    """Return a loader for pixels that are in memory, by digest."""
    return lambda refs: pixels


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """Frames of a micro-batch, in host memory.

    Attributes:
        joined: `uint8 [bytes]` of the uncached frames, or of one blank frame; see `join_frames`.
        grids: `[U, 3]` patch grids of these frames.
        computed: Cache entries of these frames, which the forward pass fills; empty without a cache, and for
            the blank frame.
        cached: Cache entries of the other frames, filled in earlier forward passes.
        feature_index: `[I]` index of each image token in the computed features, followed by the cached ones.
    """

    joined: Tensor
    grids: Ints
    computed: tuple[FrameFeatures, ...]
    cached: tuple[FrameFeatures, ...]
    feature_index: Ints


def load_image_inputs(
    refs: Sequence[FrameRef],
    expected_grids: Ints,
    load_pixels: PixelLoader,
    spec: ImageSpec,
    cache: FeatureCache | None,
    *,
    share_frames: bool = True,
    pin: bool = False,
) -> ImageInputs:
    """Load the distinct uncached frames of a micro-batch, and reserve their features in the cache.

    Args:
        refs: Frame of each image slot, in order.
        expected_grids: `[len(refs), 3]` patch grids.
        pin: Use pinned host memory.

    Raises:
        KeyError: The pixels of a frame are missing.
        ValueError: The grid of a frame differs from the expected one.
    """
    keys: list[Hashable] = [frame_key(ref) for ref in refs] if share_frames else list(range(len(refs)))
    distinct = dict(zip(keys, refs, strict=True))
    counts = dict(zip(keys, (expected_grids.prod(axis=1) // spec.merge_size**2).tolist(), strict=True))
    cached: dict[Hashable, FrameFeatures] = {}
    if cache is not None and share_frames:
        cached = {key: entry for key in distinct if (entry := cache.get(frame_key(distinct[key]))) is not None}
    uncached = [key for key in distinct if key not in cached]
    joined, grids = _load_frames([distinct[key] for key in uncached], load_pixels, spec, pin)
    _check_grids(refs, keys, dict(zip(uncached, grids, strict=False)), expected_grids)
    computed = [cache.reserve(frame_key(distinct[key]), counts[key]) for key in uncached] if cache is not None else []
    # Cached features follow the computed ones, which include the blank frame's.
    num_computed = int(grids.prod(axis=1).sum()) // spec.merge_size**2
    starts = _row_starts({key: counts[key] for key in uncached}, 0)
    starts |= _row_starts({key: counts[key] for key in cached}, num_computed)
    feature_index = [np.arange(counts[key]) + starts[key] for key in keys]
    return ImageInputs(
        joined=joined,
        grids=grids,
        computed=tuple(computed),
        cached=tuple(cached.values()),
        feature_index=np.concatenate([*feature_index, np.zeros(0, dtype=np.int64)]),
    )


def _row_starts(counts: Mapping[Hashable, int], first: int) -> dict[Hashable, int]:
    """Return the index of each key's first row, for consecutive rows from `first`."""
    ends = first + np.cumsum([0, *counts.values()])
    return {key: int(end) for key, end in zip(counts, ends, strict=False)}


def _load_frames(refs: Sequence[FrameRef], load_pixels: PixelLoader, spec: ImageSpec, pin: bool) -> tuple[Tensor, Ints]:
    """Return bytes and grids of these frames, or of one blank frame if there are none."""
    if not refs:
        side = spec.patch_size * spec.merge_size
        # Only the shape matters: the feature is multiplied by zero.
        return join_frames([np.zeros((side, side, 3), dtype=np.uint8)], spec.without_size_limits(), pin=pin)
    pixels = load_pixels(list({frame_key(ref): ref for ref in refs}.values()))
    return join_frames([_image_of(pixels, ref) for ref in refs], spec, pin=pin)


def _image_of(pixels: Mapping[str, RGB], ref: FrameRef) -> RGB:
    if ref.digest not in pixels:
        raise KeyError(f"no pixels for the frame of {ref.uri} at {ref.pts_s:.2f} s (digest {ref.digest[:12]})")
    return pixels[ref.digest].reshape(ref.height, ref.width, 3)


def _check_grids(
    refs: Sequence[FrameRef],
    keys: Sequence[Hashable],
    grid_by_key: Mapping[Hashable, Ints],
    expected_grids: Ints,
) -> None:
    for ref, key, expected in zip(refs, keys, expected_grids, strict=True):
        if key in grid_by_key and (grid_by_key[key] != expected).any():
            raise ValueError(
                f"the frame of {ref.uri} at {ref.pts_s:.2f} s has the grid {grid_by_key[key].tolist()}; "
                f"the trajectory has {expected.tolist()}"
            )
