"""Trajectories to tensors: which go together, and what the model is given.

A repeated frame goes through the vision tower once per micro-batch: pixels
are kept per distinct frame, and every image slot says which feature row it
takes. What is trained on is addressed by index into the flat hidden states,
so that a row may hold one conversation or several that share a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vz_ray.episode.trajectory import Context, Sampled, Trajectory
from vz_ray.episode.wire import placeholder_ids
from vz_ray.learner.mrope import mrope_positions
from vz_ray.learner.pixels import PixelSpec, patches
from vz_ray.video.frame import RGB, FrameRef

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

Pixels = Callable[[Sequence[FrameRef]], Mapping[str, RGB]]
"""Gives the arrays of the frames asked for, by digest; what else it gives is ignored."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids that the model gives a meaning to.

    Attributes:
        image: The image pad; one per visual token.
        pad: Fills rows up to the longest.
        vision: Every vision placeholder, `image` included: never sampled.
    """

    image: int
    pad: int
    vision: tuple[int, ...]

    @classmethod
    def of_checkpoint(cls, directory: str | Path) -> TokenIds:
        """Reads them from the tokenizer and configuration of an HF Qwen-VL checkpoint."""
        from transformers import AutoConfig, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        vision = placeholder_ids(tokenizer.get_vocab())
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(image=config.image_token_id, pad=pad, vision=vision)


@dataclass(frozen=True, slots=True)
class Example:
    """One trajectory as arrays; no pixels.

    Attributes:
        name: The trajectory's id, for errors.
        group: Whose samples share a prefix.
        ids: `[L]` expanded ids.
        sampled: `[S]` places of sampled tokens in `ids`, ascending.
        engine_logprobs: `[S]`; NaN where a turn was written rather than sampled.
        temperature: `[S]`, at which each was sampled; 1 for greedy and written turns.
        versions: `[S]` weight version that each was sampled from; -1 where a turn was written.
        after_image: `[S]`, True in turns that answer to frames, False in those that answer to text alone.
        grids: `[N, 3]` patch grids.
        refs: N frames.
    """

    name: str
    group: str
    ids: Ints
    sampled: Ints
    engine_logprobs: Floats
    temperature: Floats
    versions: Ints
    after_image: Bools
    grids: Ints
    refs: tuple[FrameRef, ...]

    @property
    def length(self) -> int:
        return len(self.ids)


def encode(trajectory: Trajectory, tokens: TokenIds, merge: int) -> Example:
    """Takes a trajectory apart, and checks the counts that must agree.

    Raises:
        ValueError: Nothing was sampled, a vision placeholder was, or image
            slots, grids and frames do not match.
    """
    name = str(trajectory.id)
    ids = np.asarray(trajectory.expanded_ids, dtype=np.int64)
    sampled = np.flatnonzero(np.asarray(trajectory.loss_mask))
    if not len(sampled):
        raise ValueError(f"trajectory {name} has no sampled token to learn from")
    if sampled[0] == 0:
        raise ValueError(f"trajectory {name} has an empty prompt: its first token has no context")
    if (found := np.isin(ids[sampled], tokens.vision)).any():
        raise ValueError(
            f"trajectory {name} sampled the vision placeholder {ids[sampled][found][0]}: it must be banned"
        )
    grids = np.asarray(trajectory.grids, dtype=np.int64).reshape(-1, 3)
    slots, expected = int((ids == tokens.image).sum()), int(grids.prod(axis=1).sum()) // merge**2
    if slots != expected:
        raise ValueError(
            f"trajectory {name} has {slots} image slots, but its {len(grids)} frames "
            f"make {expected} visual tokens"
        )
    group = f"{trajectory.id.iteration}/{trajectory.id.task}"
    return Example(name, group, ids, sampled, **_of_turns(trajectory), grids=grids, refs=trajectory.refs)


def _of_turns(trajectory: Trajectory) -> dict[str, Any]:
    """What is known of the tokens that the loss mask marks, by field of `Example`."""
    logprobs: list[float] = []
    temperature: list[float] = []
    versions: list[int] = []
    after_image: list[bool] = []
    before: Context | None = trajectory.prompt
    for turn in trajectory.turns:
        count = len(turn.action.token_ids)
        after_image += [bool(before and before.refs)] * count
        before = turn.reply
        if isinstance(turn.action, Sampled):
            logprobs += turn.action.logprobs
            temperature += [turn.action.sampling.temperature or 1.0] * count
            versions += [span.version for span in turn.action.versions for _ in range(span.start, span.end)]
        else:
            logprobs += [float("nan")] * count
            temperature += [1.0] * count
            versions += [-1] * count
    if not len(logprobs) == len(versions) == len(temperature):
        raise ValueError(
            f"trajectory {trajectory.id} has {len(temperature)} sampled tokens, {len(logprobs)} log-probs "
            f"and weight versions of {len(versions)}"
        )
    return {
        "engine_logprobs": np.asarray(logprobs, dtype=np.float32),
        "temperature": np.asarray(temperature, dtype=np.float32),
        "versions": np.asarray(versions, dtype=np.int64),
        "after_image": np.asarray(after_image, dtype=np.bool_),
    }


def plan(examples: Sequence[Example], budget: int, ranks: int) -> list[list[list[int]]]:
    """Which examples each rank takes in each micro-step: `[rank][step] -> indices`.

    Samples of one task stay together (they show the same frames), tasks are
    ordered by length, and a micro-batch holds at most `budget` tokens, padding
    included, unless a single example is longer. Every rank gets the same
    number of micro-steps, some possibly empty; their padded sizes are
    balanced. The plan depends on nothing but the arguments, so that ranks
    agree on it without talking.
    """
    longest: dict[str, int] = {}
    for example in examples:
        longest[example.group] = max(longest.get(example.group, 0), example.length)
    order = sorted(
        range(len(examples)),
        key=lambda i: (-longest[examples[i].group], examples[i].group, -examples[i].length, i),
    )
    batches: list[list[int]] = []
    width = 0
    for index in order:
        grown = max(width, examples[index].length)
        if batches and grown * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
            width = grown
        else:
            batches.append([index])
            width = examples[index].length
    return _balance(_divisible(batches, ranks), examples, ranks)


def _divisible(batches: list[list[int]], ranks: int) -> list[list[int]]:
    """Halves the fullest micro-batches until their number is a multiple of `ranks`."""
    batches = list(batches)
    while len(batches) % ranks or not batches:
        fullest = max(range(len(batches)), key=lambda b: len(batches[b]), default=None)
        if fullest is None or len(batches[fullest]) < 2:
            batches.append([])
            continue
        taken = batches[fullest]
        batches[fullest : fullest + 1] = [taken[: len(taken) // 2], taken[len(taken) // 2 :]]
    return batches


def _balance(batches: list[list[int]], examples: Sequence[Example], ranks: int) -> list[list[list[int]]]:
    """Deals micro-batches out, largest first, in rounds: the emptiest rank takes the largest of a round."""
    sizes = [max((examples[i].length for i in batch), default=0) * len(batch) for batch in batches]
    order = sorted(range(len(batches)), key=lambda b: -sizes[b])
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for start in range(0, len(order), ranks):
        emptiest = sorted(range(ranks), key=lambda r: load[r])
        for rank, batch in zip(emptiest, order[start : start + ranks], strict=True):
            dealt[rank].append(batches[batch])
            load[rank] += sizes[batch]
    return dealt


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass is given. B trajectories of at most S sampled tokens, R rows of T tokens.

    Attributes:
        indices: B places in the list of examples; none where B is 1 and the mask is 0.
        input_ids: `[R, T]`, padded on the right.
        attention_mask: `[R, T]`, 1 on tokens, 0 on padding.
        position_ids: `[3, R, T]`.
        pixel_values: `[P, 1176]` of the distinct frames; one blank frame if there is none.
        grids: `[U, 3]` of the distinct frames, on the host.
        slots: `[I]` flat places of image tokens in `[R * T]`.
        features: `[I]` the row of the merged features that each takes.
        hidden: `[B, S]` flat places of the hidden states that predict the sampled tokens.
        targets: `[B, S]` the sampled tokens.
        mask: `[B, S]`, 1 where there is one.
        temperature: `[B, S]`.
        engine_logprobs: `[B, S]`, NaN where there are none.
        versions: `[B, S]`, -1 where nothing was sampled.
        after_image: `[B, S]`.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    grids: Ints
    slots: Tensor
    features: Tensor
    hidden: Tensor
    targets: Tensor
    mask: Tensor
    temperature: Tensor
    engine_logprobs: Tensor
    versions: Tensor
    after_image: Tensor


def collate(
    indices: Sequence[int],
    examples: Sequence[Example],
    pixels: Pixels,
    tokens: TokenIds,
    spec: PixelSpec,
    device: torch.device,
    *,
    share_frames: bool = True,
) -> MicroBatch:
    """Builds one micro-batch; an empty one becomes a single pad token and a blank frame.

    `share_frames=False` gives every image slot its own frame, as a check.
    """
    chosen = [examples[i] for i in indices]
    rows, width = max(len(chosen), 1), max((e.length for e in chosen), default=1)
    ids = np.full((rows, width), tokens.pad, dtype=np.int64)
    mask = np.zeros((rows, width), dtype=np.int64)
    positions = np.zeros((3, rows, width), dtype=np.int64)
    mask[:, 0] = 1
    for row, e in enumerate(chosen):
        ids[row, : e.length], mask[row, : e.length] = e.ids, 1
        positions[:, row, : e.length] = mrope_positions(e.ids, e.grids, tokens.image, spec.merge)
    pixel_values, grids, features = _images(chosen, pixels, spec, share_frames)
    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "slots": np.flatnonzero(ids.ravel() == tokens.image) if len(features) else features,
        "features": features,
        **_sampled(chosen, width),
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return MicroBatch(indices=tuple(indices), pixel_values=pixel_values.to(device), grids=grids, **tensors)


def _images(
    chosen: Sequence[Example], pixels: Pixels, spec: PixelSpec, share_frames: bool
) -> tuple[Tensor, Ints, Ints]:
    """Patches and grids of the distinct frames, and for each image slot its feature row."""
    refs = [ref for e in chosen for ref in e.refs]
    if not refs:
        side = spec.patch * spec.merge
        # Only its shape matters: its feature is multiplied by zero.
        blank = np.zeros((side, side, 3), dtype=np.uint8)
        return *patches([blank], spec.unbounded()), np.zeros(0, dtype=np.int64)
    place: dict[object, int] = {}
    keys: list[object] = [_key(ref) for ref in refs] if share_frames else list(range(len(refs)))
    distinct: list[FrameRef] = []
    for key, ref in zip(keys, refs, strict=True):
        if place.setdefault(key, len(distinct)) == len(distinct):
            distinct.append(ref)
    arrays = pixels(list({_key(ref): ref for ref in distinct}.values()))
    pixel_values, grids = patches([_shaped(arrays, ref) for ref in distinct], spec)
    which = np.asarray([place[key] for key in keys], dtype=np.int64)
    _check_grids(refs, grids[which], np.concatenate([e.grids for e in chosen]))
    counts = grids.prod(axis=1) // spec.merge**2
    first = np.cumsum(counts) - counts
    taken = counts[which]
    offset = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
    return pixel_values, grids, np.repeat(first[which], taken) + offset


def _key(ref: FrameRef) -> tuple[str, int, int]:
    # The digest covers bytes alone: a black frame of 28 x 56 and one of 56 x 28 share it.
    return (ref.digest, ref.width, ref.height)


def _shaped(arrays: Mapping[str, RGB], ref: FrameRef) -> RGB:
    if ref.digest not in arrays:
        raise KeyError(
            f"no pixels for the frame of {ref.uri} at {ref.pts_s:.2f} s (digest {ref.digest[:12]})"
        )
    return arrays[ref.digest].reshape(ref.height, ref.width, 3)


def _check_grids(refs: Sequence[FrameRef], made: Ints, promised: Ints) -> None:
    wrong = np.flatnonzero((made != promised).any(axis=1))
    if len(wrong):
        ref, a, b = refs[wrong[0]], made[wrong[0]].tolist(), promised[wrong[0]].tolist()
        raise ValueError(
            f"frame of {ref.uri} at {ref.pts_s:.2f} s makes the grid {a}; the trajectory says {b}"
        )


def _sampled(chosen: Sequence[Example], width: int) -> dict[str, NDArray[np.generic]]:
    """Places, targets and engine log-probs of sampled tokens, `[B, S]`, left-aligned."""
    shape = (max(len(chosen), 1), max((len(e.sampled) for e in chosen), default=1))
    hidden, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask, temperature = np.zeros(shape, dtype=np.float32), np.ones(shape, dtype=np.float32)
    engine, versions = np.zeros(shape, dtype=np.float32), np.full(shape, -1, dtype=np.int64)
    after_image = np.zeros(shape, dtype=np.bool_)
    for row, e in enumerate(chosen):
        part = (row, slice(0, len(e.sampled)))
        hidden[part] = row * width + e.sampled - 1
        targets[part] = e.ids[e.sampled]
        mask[part], temperature[part], engine[part] = 1.0, e.temperature, e.engine_logprobs
        versions[part], after_image[part] = e.versions, e.after_image
    return {
        "hidden": hidden,
        "targets": targets,
        "mask": mask,
        "temperature": temperature,
        "engine_logprobs": engine,
        "versions": versions,
        "after_image": after_image,
    }


def frames_of(pixels: Mapping[str, RGB]) -> Pixels:
    """Arrays that are already here, by digest."""
    return lambda refs: pixels
