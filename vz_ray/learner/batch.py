"""Collation of packed trajectories into the tensors of one forward pass.

All tokens of a micro-batch form one sequence without padding; see `packing`. A repeated frame passes the
vision tower once: pixels are stored per distinct frame, and every image slot has the index of its feature row.
Loss inputs are addressed by position in the sequence of hidden states.

    collate_on_host: HostBatch, frames as bytes     in a thread, ahead of the computation
    HostBatch.to: MicroBatch, frames as patches     on the device, directly before the forward pass

With sequence parallelism every rank lays out the whole sequence, and keeps its tokens and their frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vz_ray.learner.attention import PackedLayout, Segment
from vz_ray.learner.example import Example, Ints, SpecialTokenIds
from vz_ray.learner.frame_cache import FeatureCache, FrameFeatures
from vz_ray.learner.image_inputs import ImageInputs, PixelLoader, load_image_inputs
from vz_ray.learner.image_patches import ImageSpec, compute_patches
from vz_ray.learner.packing import PrefixTree
from vz_ray.learner.sequence_parallel import SequenceShard

_NO_GRIDS: Ints = np.zeros((0, 3), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Inputs of one forward pass: B trajectories of at most S sampled tokens, T tokens on this rank.

    Attributes:
        indices: B indices in the list of examples; empty for an empty micro-batch (B is 1, the mask is 0).
        input_ids: `[1, T]`.
        position_ids: `[3, 1, T]`.
        layout: Segments and prefixes of the whole sequence.
        pixel_values: `[P, 3 * temporal * patch * patch]` patches of the uncached frames, or of one blank frame.
        grids: `[U, 3]` patch grids of these frames, on the host.
        computed_features: Cache entries of these frames, filled by the forward pass; empty without a cache.
        cached_features: `[K, levels * H]` features from the cache; None without cached frames.
        image_slots: `[I]` positions of image tokens in the sequence.
        feature_index: `[I]` index of each image token in the computed features, followed by the cached ones.
        hidden_index: `[B, S]` positions of the hidden states that predict the sampled tokens.
        own: `[B, S]` whether the hidden state of a sampled token is on this rank.
        targets: `[B, S]` sampled tokens.
        mask: `[B, S]` 1 for sampled tokens.
        temperature: `[B, S]`.
        engine_logprobs: `[B, S]`, NaN in external turns.
        weight_versions: `[B, S]`, -1 in external turns.
        after_image: `[B, S]`.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout
    pixel_values: Tensor
    grids: Ints
    computed_features: tuple[FrameFeatures, ...]
    cached_features: Tensor | None
    image_slots: Tensor
    feature_index: Tensor
    hidden_index: Tensor
    own: Tensor
    targets: Tensor
    mask: Tensor
    temperature: Tensor
    engine_logprobs: Tensor
    weight_versions: Tensor
    after_image: Tensor


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Tokens `start..end` of an example, and their offset in the packed sequence."""

    example: Example
    start: int
    end: int
    offset: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def frames(self) -> slice:
        return self.example.frame_slice(self.start, self.end)


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A `MicroBatch` in host memory, with frames as bytes.

    Attributes:
        tensors: Fields of `MicroBatch` by name.
    """

    indices: tuple[int, ...]
    layout: PackedLayout
    images: ImageInputs
    spec: ImageSpec
    tensors: dict[str, Tensor]

    def to(self, device: torch.device) -> MicroBatch:
        """Upload the micro-batch and compute its patches.

        Call it after the forward passes of earlier micro-batches, which compute the cached features. From
        pinned memory the upload is asynchronous.
        """

        def upload(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        images = self.images
        cached = [entry.rows for entry in images.cached if entry.rows is not None]
        if len(cached) != len(images.cached):
            raise RuntimeError("features of an earlier micro-batch are missing: its forward pass has not run")
        return MicroBatch(
            indices=self.indices,
            layout=self.layout.map(upload),
            pixel_values=compute_patches(upload(images.joined), images.grids, self.spec),
            grids=images.grids,
            computed_features=images.computed,
            cached_features=upload(torch.cat(cached)) if cached else None,
            **{name: upload(tensor) for name, tensor in self.tensors.items()},
        )


def collate(
    trees: Sequence[PrefixTree],
    examples: Sequence[Example],
    load_pixels: PixelLoader,
    tokens: SpecialTokenIds,
    spec: ImageSpec,
    device: torch.device,
    **options: Any,
) -> MicroBatch:
    """Build one micro-batch on a device; see `collate_on_host` for `options`."""
    return collate_on_host(trees, examples, load_pixels, tokens, spec, **options).to(device)


def collate_on_host(
    trees: Sequence[PrefixTree],
    examples: Sequence[Example],
    load_pixels: PixelLoader,
    tokens: SpecialTokenIds,
    spec: ImageSpec,
    *,
    cache: FeatureCache | None = None,
    share_frames: bool = True,
    pin: bool = False,
    shard: SequenceShard | None = None,
) -> HostBatch:
    """Build one micro-batch in host memory. An empty one consists of a pad token and a blank frame.

    Args:
        cache: Features of a frozen tower; cached frames are neither loaded nor computed. Micro-batches must be
            computed in the order in which they are built with the same cache.
        share_frames: Whether repeated frames are computed once; False is for tests and benchmarks.
        pin: Use pinned memory.
        shard: Part of the sequence to keep; the sequence is padded so that all parts have the same length.

    Raises:
        KeyError: The pixels of a frame are missing.
        ValueError: The grid of a frame differs from its trajectory's.
    """
    members = [index for tree in trees for index in tree.members]
    spans, segments, hidden_index = _lay_out(trees, examples)
    length = segments[-1].end
    if shard is not None and (padded := shard.padded_length(length)) > length:
        segments.append(Segment(length, padded))
        length = padded
    ids, positions = np.full(length, tokens.pad), np.zeros((3, length), dtype=np.int64)
    for span in spans:
        example, target = span.example, slice(span.offset, span.offset + span.length)
        ids[target] = example.token_ids[span.start : span.end]
        all_positions = mrope_positions(example.token_ids, example.grids, tokens.image, spec.merge_size)
        positions[:, target] = all_positions[:, span.start : span.end]
    refs = [ref for span in spans for ref in span.example.refs[span.frames]]
    grids = np.concatenate([*(span.example.grids[span.frames] for span in spans), _NO_GRIDS])
    start, end = shard.token_range(length) if shard is not None else (0, length)
    slots = np.flatnonzero(ids == tokens.image) if refs else np.zeros(0, dtype=np.int64)
    own_slots = (slots >= start) & (slots < end)
    frame_of_slot = np.repeat(np.arange(len(refs)), grids.prod(axis=1) // spec.merge_size**2)
    shown = np.unique(frame_of_slot[own_slots])
    images = load_image_inputs(
        [refs[frame] for frame in shown], grids[shown], load_pixels, spec, cache, share_frames=share_frames, pin=pin
    )
    # A frame at the edge also has tokens on the neighbouring rank.
    feature_index = images.feature_index[own_slots[np.isin(frame_of_slot, shown)]]
    arrays = {
        "input_ids": ids[None, start:end],
        "position_ids": positions[:, None, start:end],
        "image_slots": slots[own_slots] - start,
        "feature_index": feature_index,
        **_sampled_token_arrays([examples[index] for index in members], hidden_index),
    }
    hidden, mask = arrays["hidden_index"], arrays["mask"] > 0
    arrays["own"] = mask & (hidden >= start) & (hidden < end)
    arrays["hidden_index"] = np.where(arrays["own"], hidden - start, 0)

    def place(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if pin else tensor

    return HostBatch(
        indices=tuple(members),
        layout=PackedLayout.from_segments(segments, torch.device("cpu"), shard).map(place),
        images=images,
        spec=spec,
        tensors={name: place(torch.from_numpy(array)) for name, array in arrays.items()},
    )


def mrope_positions(ids: Ints, grids: Ints, image_token: int, merge: int) -> Ints:
    """Compute the rotary positions (M-RoPE) of one conversation; equal to HF's `get_rope_index`.

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
    rows, columns = grids[:, 1] // merge, grids[:, 2] // merge
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


def _lay_out(
    trees: Sequence[PrefixTree], examples: Sequence[Example]
) -> tuple[list[TokenSpan], list[Segment], list[Ints]]:
    """Place the trees in the sequence.

    Returns:
        Token spans, segments, and for each member the positions of the hidden states that predict its
        sampled tokens.
    """
    spans: list[TokenSpan] = []
    segments: list[Segment] = []
    hidden_index: list[Ints] = []
    offset = 0
    for tree in trees:
        base, prefix = offset, tree.prefix_length
        offset += prefix
        if prefix:
            spans.append(TokenSpan(examples[tree.members[0]], 0, prefix, base))
            segments.append(Segment(base, offset))
        for index in tree.members:
            example = examples[index]
            predictors = example.sampled_positions - 1
            in_prefix = predictors < prefix
            hidden_index.append(np.where(in_prefix, base + predictors, offset + predictors - prefix))
            if example.context_length > prefix:
                spans.append(TokenSpan(example, prefix, example.context_length, offset))
                start, offset = offset, offset + example.context_length - prefix
                segments.append(Segment(start, offset, (base, base + prefix) if prefix else (0, 0)))
    return spans, segments or [Segment(0, 1)], hidden_index


def _sampled_token_arrays(examples: Sequence[Example], hidden_index: Sequence[Ints]) -> dict[str, NDArray[np.generic]]:
    """Return the fields of sampled tokens, `[B, S]`, left-aligned."""
    max_sampled = max((len(example.sampled_positions) for example in examples), default=1)
    shape = (max(len(examples), 1), max_sampled)
    hidden, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask, temperature = np.zeros(shape, dtype=np.float32), np.ones(shape, dtype=np.float32)
    engine_logprobs, versions = np.zeros(shape, dtype=np.float32), np.full(shape, -1, dtype=np.int64)
    after_image = np.zeros(shape, dtype=np.bool_)
    for row, (example, positions) in enumerate(zip(examples, hidden_index, strict=True)):
        part = (row, slice(0, len(example.sampled_positions)))
        hidden[part], targets[part] = positions, example.token_ids[example.sampled_positions]
        mask[part], temperature[part] = 1.0, example.temperature
        engine_logprobs[part], versions[part] = example.engine_logprobs, example.weight_versions
        after_image[part] = example.after_image
    return {
        "hidden_index": hidden,
        "targets": targets,
        "mask": mask,
        "temperature": temperature,
        "engine_logprobs": engine_logprobs,
        "weight_versions": versions,
        "after_image": after_image,
    }
