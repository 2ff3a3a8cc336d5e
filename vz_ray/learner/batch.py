"""Trajectories to tensors: what the model is given in one forward pass.

All tokens of a micro-batch lie in one sequence without padding (`packing`).
A repeated frame goes through the vision tower once: pixels are kept per
distinct frame, and every image slot says which feature row it takes. What is
trained on is addressed by place in the sequence of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vz_ray.learner.attention import PackedLayout, Segment
from vz_ray.learner.example import Example, FrameKey, Ints, SpecialTokenIds, frame_key
from vz_ray.learner.frame_cache import FeatureCache
from vz_ray.learner.image_patches import ImageSpec, extract_patches
from vz_ray.learner.mrope import mrope_positions
from vz_ray.learner.packing import PrefixTree
from vz_ray.video.frame import RGB, FrameRef

PixelLoader = Callable[[Sequence[FrameRef]], Mapping[str, RGB]]
"""Gives the arrays of the frames asked for, by digest; what else it gives is ignored."""


def in_memory_pixels(pixels: Mapping[str, RGB]) -> PixelLoader:
    """Arrays that are already here, by digest."""
    return lambda refs: pixels


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass is given. B trajectories of at most S sampled tokens, T tokens in all.

    Attributes:
        indices: B places in the list of examples; none where B is 1 and the mask is 0.
        input_ids: `[1, T]`.
        position_ids: `[3, 1, T]`.
        layout: Who sees whom.
        pixel_values: `[P, 1176]` of the frames to be seen; one blank frame if there is none.
        grids: `[U, 3]` of these, on the host.
        frame_keys: U keys of these; none for the blank one.
        cached_features: `[K, H]` features of frames that need not be seen again, if there are any.
        image_slots: `[I]` places of image tokens in the sequence.
        feature_index: `[I]` the row that each takes of the features seen, followed by those known.
        hidden_index: `[B, S]` places of the hidden states that predict the sampled tokens.
        targets: `[B, S]` the sampled tokens.
        mask: `[B, S]`, 1 where there is one.
        temperature: `[B, S]`.
        engine_logprobs: `[B, S]`, NaN where there are none.
        weight_versions: `[B, S]`, -1 where nothing was sampled.
        after_image: `[B, S]`.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout
    pixel_values: Tensor
    grids: Ints
    frame_keys: tuple[FrameKey, ...]
    cached_features: Tensor | None
    image_slots: Tensor
    feature_index: Tensor
    hidden_index: Tensor
    targets: Tensor
    mask: Tensor
    temperature: Tensor
    engine_logprobs: Tensor
    weight_versions: Tensor
    after_image: Tensor


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A run of one example's tokens at its place in the sequence."""

    example: Example
    start: int
    end: int
    place: int

    @property
    def frames(self) -> slice:
        return self.example.frame_slice(self.start, self.end)


def collate(
    trees: Sequence[PrefixTree],
    examples: Sequence[Example],
    pixels: PixelLoader,
    tokens: SpecialTokenIds,
    spec: ImageSpec,
    device: torch.device,
    *,
    cache: FeatureCache | None = None,
    share_frames: bool = True,
) -> MicroBatch:
    """Builds one micro-batch; an empty one becomes a single pad token and a blank frame.

    Args:
        cache: Features of a frozen tower: frames in it are neither fetched nor seen.
        share_frames: False gives every image slot its own frame, as a check.

    Raises:
        KeyError: Pixels of a frame are missing.
        ValueError: A frame makes another grid than its trajectory says.
    """
    members = [index for tree in trees for index in tree.members]
    pieces, segments, hidden = _lay_out(trees, examples)
    length = max(sum(piece.end - piece.start for piece in pieces), 1)
    ids, positions = np.full(length, tokens.pad), np.zeros((3, length), dtype=np.int64)
    for piece in pieces:
        e, part = piece.example, slice(piece.place, piece.place + piece.end - piece.start)
        ids[part] = e.token_ids[piece.start : piece.end]
        whole = mrope_positions(e.token_ids, e.grids, tokens.image, spec.merge_size)
        positions[:, part] = whole[:, piece.start : piece.end]
    images = _images(pieces, pixels, spec, cache, share_frames)
    slots = np.flatnonzero(ids == tokens.image) if len(images.features) else images.features
    arrays = {
        "input_ids": ids[None],
        "position_ids": positions[:, None],
        "image_slots": slots,
        "feature_index": images.features,
        **_sampled([examples[i] for i in members], hidden),
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return MicroBatch(
        indices=tuple(members),
        layout=PackedLayout.from_segments(segments, device),
        pixel_values=images.pixel_values.to(device),
        grids=images.grids,
        frame_keys=images.frames,
        cached_features=None if images.known is None else images.known.to(device),
        **tensors,
    )


def _lay_out(
    trees: Sequence[PrefixTree], examples: Sequence[Example]
) -> tuple[list[TokenSpan], list[Segment], list[Ints]]:
    """What lies where, and for each member the places of the states that predict its sampled tokens."""
    pieces: list[TokenSpan] = []
    segments: list[Segment] = []
    hidden: list[Ints] = []
    place = 0
    for tree in trees:
        base, prefix = place, tree.prefix_length
        place += prefix
        if prefix:
            pieces.append(TokenSpan(examples[tree.members[0]], 0, prefix, base))
            segments.append(Segment(base, place))
        for index in tree.members:
            e = examples[index]
            predicts = e.sampled_positions - 1
            hidden.append(np.where(predicts < prefix, base + predicts, place + predicts - prefix))
            if e.context_length > prefix:
                pieces.append(TokenSpan(e, prefix, e.context_length, place))
                start, place = place, place + e.context_length - prefix
                segments.append(Segment(start, place, (base, base + prefix) if prefix else (0, 0)))
    return pieces, segments or [Segment(0, 1)], hidden


@dataclass(frozen=True, slots=True)
class ImageInputs:
    pixel_values: Tensor
    grids: Ints
    frames: tuple[FrameKey, ...]
    known: Tensor | None
    features: Ints


def _images(
    pieces: Sequence[TokenSpan],
    pixels: PixelLoader,
    spec: ImageSpec,
    cache: FeatureCache | None,
    share_frames: bool,
) -> ImageInputs:
    """Patches and grids of the distinct frames, and for each image slot its feature row."""
    refs = [ref for piece in pieces for ref in piece.example.refs[piece.frames]]
    promised = [piece.example.grids[piece.frames] for piece in pieces]
    keys: list[object] = [frame_key(ref) for ref in refs] if share_frames else list(range(len(refs)))
    distinct = dict(zip(keys, refs, strict=True))
    known: dict[object, Tensor] = {}
    if cache is not None and share_frames:
        known = {key: found for key in distinct if (found := cache.get(frame_key(distinct[key]))) is not None}
    unseen = [key for key in distinct if key not in known]
    values, grids = _patches([distinct[key] for key in unseen], pixels, spec)
    counts = dict(zip(unseen, grids.prod(axis=1) // spec.merge_size**2, strict=False))
    _check_grids(refs, keys, dict(zip(unseen, grids, strict=False)), np.concatenate([*promised, _NO_GRIDS]))
    first = int(sum(counts.values())) if unseen else int(grids.prod(axis=1).sum()) // spec.merge_size**2
    starts, rows = _starts(counts, 0), {key: len(found) for key, found in known.items()}
    starts |= _starts(rows, first)
    counts |= rows
    features = [np.arange(counts[key]) + starts[key] for key in keys]
    return ImageInputs(
        pixel_values=values,
        grids=grids,
        frames=tuple(frame_key(distinct[key]) for key in unseen),
        known=torch.cat(list(known.values())) if known else None,
        features=np.concatenate([*features, np.zeros(0, dtype=np.int64)]),
    )


_NO_GRIDS: Ints = np.zeros((0, 3), dtype=np.int64)


def _starts(counts: Mapping[object, int], first: int) -> dict[object, int]:
    """Where each one's rows begin, one after the other."""
    ends = first + np.cumsum([0, *counts.values()])
    return {key: int(end) for key, end in zip(counts, ends, strict=False)}


def _patches(refs: Sequence[FrameRef], pixels: PixelLoader, spec: ImageSpec) -> tuple[Tensor, Ints]:
    """Patches and grids of these frames, or of a blank one."""
    if not refs:
        side = spec.patch_size * spec.merge_size
        # Only its shape matters: its feature is multiplied by zero.
        return extract_patches([np.zeros((side, side, 3), dtype=np.uint8)], spec.without_size_limits())
    arrays = pixels(list({frame_key(ref): ref for ref in refs}.values()))
    return extract_patches([_shaped(arrays, ref) for ref in refs], spec)


def _shaped(arrays: Mapping[str, RGB], ref: FrameRef) -> RGB:
    if ref.digest not in arrays:
        raise KeyError(
            f"no pixels for the frame of {ref.uri} at {ref.pts_s:.2f} s (digest {ref.digest[:12]})"
        )
    return arrays[ref.digest].reshape(ref.height, ref.width, 3)


def _check_grids(
    refs: Sequence[FrameRef], keys: Sequence[object], made: Mapping[object, Ints], promised: Ints
) -> None:
    for ref, key, expected in zip(refs, keys, promised, strict=True):
        if key in made and (made[key] != expected).any():
            raise ValueError(
                f"frame of {ref.uri} at {ref.pts_s:.2f} s makes the grid {made[key].tolist()}; "
                f"the trajectory says {expected.tolist()}"
            )


def _sampled(chosen: Sequence[Example], hidden: Sequence[Ints]) -> dict[str, NDArray[np.generic]]:
    """Places, targets and engine log-probs of sampled tokens, `[B, S]`, left-aligned."""
    shape = (max(len(chosen), 1), max((len(e.sampled_positions) for e in chosen), default=1))
    places, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask, temperature = np.zeros(shape, dtype=np.float32), np.ones(shape, dtype=np.float32)
    engine, versions = np.zeros(shape, dtype=np.float32), np.full(shape, -1, dtype=np.int64)
    after_image = np.zeros(shape, dtype=np.bool_)
    for row, (e, where) in enumerate(zip(chosen, hidden, strict=True)):
        part = (row, slice(0, len(e.sampled_positions)))
        places[part], targets[part] = where, e.token_ids[e.sampled_positions]
        mask[part], temperature[part], engine[part] = 1.0, e.temperature, e.engine_logprobs
        versions[part], after_image[part] = e.weight_versions, e.after_image
    return {
        "hidden_index": places,
        "targets": targets,
        "mask": mask,
        "temperature": temperature,
        "engine_logprobs": engine,
        "weight_versions": versions,
        "after_image": after_image,
    }
