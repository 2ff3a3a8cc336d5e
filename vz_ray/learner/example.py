"""Trajectories as arrays: token ids, sampled tokens, frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vz_ray.env.chat_format import vision_placeholder_ids
from vz_ray.env.trajectory import SampledAction, TokenContext, Trajectory
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.video.frame import RGB, FrameRef
from vz_ray.weight_sync.parity_probe import ParityProbe

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

FrameKey = tuple[str, int, int]
"""Identifies the pixels of a frame: digest, width, height."""


def frame_key(ref: FrameRef) -> FrameKey:
    """Return the key of a frame."""
    # The digest covers bytes only: black frames of 28 x 56 and 56 x 28 pixels have the same digest.
    return (ref.digest, ref.width, ref.height)


@dataclass(frozen=True, slots=True)
class SpecialTokenIds:
    """Special token ids of a model.

    Attributes:
        image: Image pad; one per visual token.
        pad: Padding token of empty micro-batches.
        vision: All vision placeholders, `image` included; never sampled.
    """

    image: int
    pad: int
    vision: tuple[int, ...]

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> SpecialTokenIds:
        """Read the ids from the tokenizer and config of an HF Qwen-VL checkpoint."""
        from transformers import AutoConfig, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        vision = vision_placeholder_ids(tokenizer.get_vocab())
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(image=config.image_token_id, pad=pad, vision=vision)


@dataclass(frozen=True, slots=True)
class Example:
    """One trajectory as arrays, without pixels.

    Attributes:
        name: Id of the trajectory, for errors.
        group_id: Trajectories with equal ids can share a prefix.
        token_ids: `[L]` ids with one image pad per visual token.
        sampled_positions: `[S]` positions of sampled tokens in `token_ids`, ascending.
        turn_lengths: `[turns]` sampled tokens of each turn; the sum is S.
        engine_logprobs: `[S]`; NaN in external turns.
        temperature: `[S]` sampling temperature; 1 for greedy and external turns.
        weight_versions: `[S]` weight version of the sampling engine; -1 in external turns.
        after_image: `[S]` True in turns after an observation with frames, False after text only.
        grids: `[N, 3]` patch grids.
        image_starts: `[N]` position in `token_ids` of each frame's first image pad.
        image_token_counts: `[N]` image pads of each frame.
        refs: N frame references.
    """

    name: str
    group_id: str
    token_ids: Ints
    sampled_positions: Ints
    turn_lengths: Ints
    engine_logprobs: Floats
    temperature: Floats
    weight_versions: Ints
    after_image: Bools
    grids: Ints
    image_starts: Ints
    image_token_counts: Ints
    refs: tuple[FrameRef, ...]

    @property
    def length(self) -> int:
        """Number of tokens of the whole trajectory."""
        return len(self.token_ids)

    @property
    def context_length(self) -> int:
        """Number of tokens to compute: all before the last sampled token, whose state is not used."""
        return int(self.sampled_positions[-1])

    def frame_slice(self, start: int, end: int) -> slice:
        """Return the index range of frames in `token_ids[start:end]`; neither end may be within a frame."""
        first, last = np.searchsorted(self.image_starts, (start, end))
        return slice(int(first), int(last))


def encode_trajectory(trajectory: Trajectory, tokens: SpecialTokenIds, merge: int) -> Example:
    """Convert a trajectory to arrays and check that its counts agree.

    Raises:
        ValueError: No token was sampled, a vision placeholder was sampled, or the numbers of image slots,
            grids and frames differ.
    """
    name = str(trajectory.id)
    ids = np.asarray(trajectory.expanded_ids, dtype=np.int64)
    sampled = np.flatnonzero(np.asarray(trajectory.loss_mask))
    if not len(sampled):
        raise ValueError(f"trajectory {name} has no sampled token")
    if sampled[0] == 0:
        raise ValueError(f"trajectory {name} has an empty prompt: its first sampled token has no context")
    if (is_placeholder := np.isin(ids[sampled], tokens.vision)).any():
        raise ValueError(
            f"trajectory {name} sampled the vision placeholder {ids[sampled][is_placeholder][0]}; the engine "
            "must exclude vision placeholders"
        )
    grids = np.asarray(trajectory.grids, dtype=np.int64).reshape(-1, 3)
    if len(grids) != len(trajectory.frame_refs):
        raise ValueError(f"trajectory {name} has {len(trajectory.frame_refs)} frames, but {len(grids)} grids")
    slots, visual = np.flatnonzero(ids == tokens.image), grids.prod(axis=1) // merge**2
    if len(slots) != visual.sum():
        raise ValueError(
            f"trajectory {name} has {len(slots)} image slots, but its {len(grids)} frames "
            f"make {visual.sum()} visual tokens"
        )
    return Example(
        name=name,
        group_id=f"{trajectory.id.step}/{trajectory.id.task_id}",
        token_ids=ids,
        sampled_positions=sampled,
        turn_lengths=np.asarray([len(turn.action.token_ids) for turn in trajectory.turns], dtype=np.int64),
        grids=grids,
        image_starts=slots[np.cumsum(visual) - visual],
        image_token_counts=visual,
        refs=trajectory.frame_refs,
        **_turn_arrays(trajectory),
    )


def _turn_arrays(trajectory: Trajectory) -> dict[str, Any]:
    """Return arrays over the sampled tokens, by field of `Example`."""
    logprobs: list[float] = []
    temperature: list[float] = []
    weight_versions: list[int] = []
    after_image: list[bool] = []
    context: TokenContext | None = trajectory.prompt
    for turn in trajectory.turns:
        count = len(turn.action.token_ids)
        after_image += [bool(context and context.frame_refs)] * count
        context = turn.observation
        if isinstance(turn.action, SampledAction):
            logprobs += turn.action.logprobs
            temperature += [turn.action.sampling_params.temperature or 1.0] * count
            weight_versions += [span.version for span in turn.action.versions for _ in range(span.start, span.end)]
        else:
            logprobs += [float("nan")] * count
            temperature += [1.0] * count
            weight_versions += [-1] * count
    if not len(logprobs) == len(weight_versions) == len(temperature):
        raise ValueError(
            f"trajectory {trajectory.id} has {len(temperature)} sampled tokens, {len(logprobs)} log-probs "
            f"and weight versions for {len(weight_versions)}"
        )
    return {
        "engine_logprobs": np.asarray(logprobs, dtype=np.float32),
        "temperature": np.asarray(temperature, dtype=np.float32),
        "weight_versions": np.asarray(weight_versions, dtype=np.int64),
        "after_image": np.asarray(after_image, dtype=np.bool_),
    }


def teacher_logprobs(trajectories: Sequence[Trajectory], examples: Sequence[Example]) -> list[NDArray[np.float64]]:
    """Return the teacher's log-probs of the sampled tokens of each example, `[S]` each.

    Raises:
        ValueError: A trajectory was not scored by the teacher, or not completely.
    """
    rows = []
    for trajectory, example in zip(trajectories, examples, strict=True):
        row = np.asarray(trajectory.teacher_logprobs, dtype=np.float64)
        if len(row) != len(example.sampled_positions) or not np.isfinite(row).all():
            raise ValueError(
                f"trajectory {example.name} has {np.isfinite(row).sum()} log-probs of the teacher for "
                f"{len(example.sampled_positions)} sampled tokens"
            )
        rows.append(row)
    return rows


def encode_probe(probe: ParityProbe, tokens: SpecialTokenIds, spec: ImageSpec) -> tuple[Example, dict[str, RGB]]:
    """Return the probe as an example sampled at temperature 1, and its images by digest.

    Raises:
        ValueError: The model's image processor would resize an image.
    """
    ids = np.asarray([*probe.expanded_ids, *probe.token_ids], dtype=np.int64)
    count = len(probe.token_ids)
    grids = np.asarray([spec.grid(*frame.rgb.shape[:2]) for frame in probe.frames]).reshape(-1, 3)
    visual = grids.prod(axis=1) // spec.merge_size**2
    example = Example(
        name="probe",
        group_id="probe",
        token_ids=ids,
        sampled_positions=np.arange(len(ids) - count, len(ids)),
        turn_lengths=np.asarray([count], dtype=np.int64),
        engine_logprobs=np.full(count, np.nan, dtype=np.float32),
        temperature=np.ones(count, dtype=np.float32),
        weight_versions=np.full(count, -1, dtype=np.int64),
        after_image=np.ones(count, dtype=np.bool_),
        grids=grids,
        image_starts=np.flatnonzero(ids == tokens.image)[np.cumsum(visual) - visual],
        image_token_counts=visual,
        refs=tuple(frame.ref for frame in probe.frames),
    )
    return example, {frame.ref.digest: frame.rgb for frame in probe.frames}
