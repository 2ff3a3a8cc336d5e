"""A trajectory as arrays: what it says, what of it was sampled, and which frames it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vz_ray.env.chat_format import vision_placeholder_ids
from vz_ray.env.trajectory import SampledAction, TokenContext, Trajectory
from vz_ray.video.frame import FrameRef

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

FrameKey = tuple[str, int, int]
"""What tells the pixels of one frame from those of another: digest, width, height."""


def frame_key(ref: FrameRef) -> FrameKey:
    """The key of a frame."""
    # The digest covers bytes alone: a black frame of 28 x 56 and one of 56 x 28 share it.
    return (ref.digest, ref.width, ref.height)


@dataclass(frozen=True, slots=True)
class SpecialTokenIds:
    """Ids that the model gives a meaning to.

    Attributes:
        image: The image pad; one per visual token.
        pad: Stands where there is nothing to compute.
        vision: Every vision placeholder, `image` included: never sampled.
    """

    image: int
    pad: int
    vision: tuple[int, ...]

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> SpecialTokenIds:
        """Reads them from the tokenizer and configuration of an HF Qwen-VL checkpoint."""
        from transformers import AutoConfig, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        vision = vision_placeholder_ids(tokenizer.get_vocab())
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(image=config.image_token_id, pad=pad, vision=vision)


@dataclass(frozen=True, slots=True)
class Example:
    """One trajectory as arrays; no pixels.

    Attributes:
        name: The trajectory's id, for errors.
        group_id: Whose samples share a prefix.
        token_ids: `[L]` expanded ids.
        sampled_positions: `[S]` places of sampled tokens in `token_ids`, ascending.
        engine_logprobs: `[S]`; NaN where a turn was written rather than sampled.
        temperature: `[S]`, at which each was sampled; 1 for greedy and written turns.
        weight_versions: `[S]` weight version that each was sampled from; -1 where a turn was written.
        after_image: `[S]`, True in turns that answer to frames, False in those that answer to text alone.
        grids: `[N, 3]` patch grids.
        image_starts: `[N]` places in `token_ids` of each frame's first image pad.
        image_token_counts: `[N]` image pads of each frame.
        refs: N frames.
    """

    name: str
    group_id: str
    token_ids: Ints
    sampled_positions: Ints
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
        """Tokens of the whole trajectory."""
        return len(self.token_ids)

    @property
    def context_length(self) -> int:
        """Tokens that have to be computed: all before the last sampled one, which nothing depends on."""
        return int(self.sampled_positions[-1])

    def frame_slice(self, start: int, end: int) -> slice:
        """Which frames lie within `ids[start:end]`; neither end may be within a frame."""
        first, last = np.searchsorted(self.image_starts, (start, end))
        return slice(int(first), int(last))


def encode_trajectory(trajectory: Trajectory, tokens: SpecialTokenIds, merge: int) -> Example:
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
        grids=grids,
        image_starts=slots[np.cumsum(visual) - visual],
        image_token_counts=visual,
        refs=trajectory.frame_refs,
        **_of_turns(trajectory),
    )


def _of_turns(trajectory: Trajectory) -> dict[str, Any]:
    """What is known of the tokens that the loss mask marks, by field of `Example`."""
    logprobs: list[float] = []
    temperature: list[float] = []
    versions: list[int] = []
    after_image: list[bool] = []
    before: TokenContext | None = trajectory.prompt
    for turn in trajectory.turns:
        count = len(turn.action.token_ids)
        after_image += [bool(before and before.frame_refs)] * count
        before = turn.observation
        if isinstance(turn.action, SampledAction):
            logprobs += turn.action.logprobs
            temperature += [turn.action.sampling_params.temperature or 1.0] * count
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
        "weight_versions": np.asarray(versions, dtype=np.int64),
        "after_image": np.asarray(after_image, dtype=np.bool_),
    }
