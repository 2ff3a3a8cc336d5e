"""What a learner rank's GPU holds under DeepSpeed.

ZeRO's shares as DeepSpeed 0.19 allocates them with the settings of `vz_ray.learner.engine`: gradients
add up in float32, one reduction bucket, no overlap of communication.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.learner import LearnerConfig
from vz_ray.observe.errors import UserError
from vz_ray.plan import activations
from vz_ray.plan.budget import EpisodeBudget
from vz_ray.plan.memory import GIB, Footprint, Known, Part, When
from vz_ray.plan.shape import ModelShape

FP32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size`; allocated whole."""
LIVE = 1_000_000_000
"""Elements of `stage3_max_live_parameters`: weights gathered from other ranks at a time."""
SUB_GROUP = 1_000_000_000
"""Elements of `sub_group_size`: ZeRO-3 steps through so many at a time."""
OUTSIDE = 2 * GIB
"""Assumed of the CUDA context, NCCL's buffers and kernels' workspaces."""
FRAGMENTED = 0.05
"""Assumed share of what a pass allocates that the allocator holds and cannot use."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The largest micro-batch.

    Attributes:
        tokens: In all rows, padding included.
        patches: Of distinct frames.
        sampled: Tokens whose log-probs are wanted.
    """

    tokens: int
    patches: int
    sampled: int


def largest_pass(learner: LearnerConfig, longest: EpisodeBudget) -> Pass:
    """A micro-batch that is full, of as many frames as such tokens can be; a longer episode goes alone."""
    tokens = max(learner.micro_batch_tokens, longest.tokens)
    frames = max(longest.frames, tokens // longest.slot)
    sampled = longest.sampled * max(1, tokens // longest.tokens)
    return Pass(tokens, frames * longest.frame.patches, min(sampled, tokens))


def width_of(learner: LearnerConfig) -> int:
    """Bytes of a weight on a GPU.

    `auto` is bfloat16 there, save at stage 0, where only float32 can be trained.

    Raises:
        UserError: bfloat16 at stage 0, which the learner refuses.
    """
    if learner.dtype == "bfloat16" and learner.zero_stage == 0:
        raise UserError(
            "learner.zero_stage is 0 with learner.dtype bfloat16: no float32 copy of the weights is kept and "
            "the learner refuses it; set learner.zero_stage=1, 2 or 3"
        )
    return FP32 if learner.dtype == "float32" or learner.zero_stage == 0 else 2


def rank_footprint(
    shape: ModelShape, learner: LearnerConfig, longest: EpisodeBudget, capacity: int, *, reference: bool
) -> Footprint:
    """Of one rank's GPU; `reference` says whether a reference model is held, too."""
    most = largest_pass(learner, longest)
    parts = [
        *_weights(shape, learner, reference),
        *_optimizer(shape, learner),
        *_activations(shape, learner, most),
        Part("CUDA context and NCCL", OUTSIDE, Known.ASSUMED),
    ]
    moving = sum(part.bytes for part in parts if part.when is When.PASS)
    parts.append(Part("allocator's gaps", int(FRAGMENTED * moving), Known.ASSUMED, When.PASS))
    return Footprint("learner", learner.ranks, capacity, tuple(part for part in parts if part.bytes))


def trained_elements(shape: ModelShape, learner: LearnerConfig) -> int:
    """Weights that have gradients."""
    return shape.text.parameters if learner.freeze_vision else shape.parameters


def _weights(shape: ModelShape, learner: LearnerConfig, reference: bool) -> list[Part]:
    width, trained = width_of(learner), trained_elements(shape, learner)
    whole = learner.zero_stage < 3
    shards = 1 if whole else learner.ranks
    frozen = shape.parameters - trained
    parts = [Part("weights", _share(width * trained, shards))]
    parts.append(Part("frozen vision tower", _share(width * frozen, shards)))
    if reference:
        parts.append(Part("reference model", _share(width * shape.parameters, shards)))
    if not whole and learner.ranks > 1:
        gathered = width * min(shape.parameters, LIVE)
        parts.append(Part("weights gathered for a pass", gathered, Known.ESTIMATE, When.PASS))
    held = width * shape.parameters + (_share(width * shape.parameters, shards) if reference else 0)
    parts.append(Part("whole weights while loading", held + OUTSIDE, Known.ESTIMATE, When.LOAD))
    return parts


def _optimizer(shape: ModelShape, learner: LearnerConfig) -> list[Part]:
    width, trained = width_of(learner), trained_elements(shape, learner)
    stage = learner.zero_stage
    shards = learner.ranks if stage else 1
    parts = []
    if not learner.offload:
        # Without ZeRO, and where weights are float32 under stage 3, the weights are their own master copy.
        own = stage == 0 or (stage == 3 and width == FP32)
        parts.append(Part("master weights, float32", 0 if own else _share(FP32 * trained, shards)))
        parts.append(Part("two moments, float32", _share(2 * FP32 * trained, shards)))
    parts += _gradients(learner, width, trained)
    if stage >= 2:
        parts.append(Part("reduction bucket", width * BUCKET))
    if not learner.offload:
        # The gradient in float32 once more, and the square root of the second moment.
        step = min(_elements(trained, shards), SUB_GROUP if stage == 3 else trained)
        copies = 2 if stage >= 2 else 1
        parts.append(Part("optimizer at work", copies * FP32 * step, Known.ESTIMATE, When.STEP))
    return parts


def _gradients(learner: LearnerConfig, width: int, trained: int) -> list[Part]:
    """Under ZeRO 0 and 1 whole on every rank, and at stage 1 in `width` besides."""
    if learner.zero_stage == 0:
        return [Part("gradients", FP32 * trained)]
    if learner.zero_stage == 1:
        besides = 0 if width == FP32 else width * trained
        return [
            Part("gradients, float32", FP32 * trained),
            Part("gradients as they are made", besides, Known.ESTIMATE, When.PASS),
        ]
    share = _share(FP32 * trained, learner.ranks)
    made = _share(width * trained, learner.ranks) if learner.zero_stage == 2 else 0
    return [
        Part("gradients, float32", 0 if learner.offload else share),
        Part("gradients as they are made", made, Known.ESTIMATE, When.PASS),
    ]


def host_bytes(shape: ModelShape, learner: LearnerConfig, *, reference: bool) -> int:
    """Most host memory of one rank: whole models as they are read, or offloaded optimizer state.

    The frame cache (`learner.frame_cache_mib`) comes on top of it, and the process itself.
    """
    reading = width_of(learner) * shape.parameters * (2 if reference else 1)
    offloaded = 4 * FP32 * _elements(trained_elements(shape, learner), learner.ranks)
    return max(reading, offloaded if learner.offload else 0) + learner.frame_cache_mib * (1 << 20)


def _activations(shape: ModelShape, learner: LearnerConfig, most: Pass) -> list[Part]:
    width, again = width_of(learner), learner.gradient_checkpointing
    text, vision = shape.text, shape.vision
    kept = activations.text_kept(text, width, most.tokens, checkpointing=again)
    kept += activations.head_kept(text, width, most.sampled)
    pixels = activations.pixel_input(vision, width, most.patches)
    if learner.freeze_vision:
        tower, patches = 0, 0
    else:
        tower = activations.vision_kept(vision, width, most.patches, checkpointing=again)
        patches = most.patches
    layer = activations.layer_at_work(shape, width, most.tokens, patches, checkpointing=again)
    logits = activations.logits_at_work(text, width, most.sampled, learner.logprob_chunk_tokens)
    if learner.freeze_vision:
        layer = max(layer, activations.frozen_tower(vision, width, most.patches))
    named = {
        "activations, language model": kept,
        "activations, vision tower": tower + pixels,
        # At the end of the forward pass and in the layers' backward pass: never at the same time.
        "logits at work" if logits >= layer else "a layer at work": max(logits, layer),
    }
    return [Part(name, size, Known.ESTIMATE, When.PASS) for name, size in named.items()]


def _elements(count: int, shards: int) -> int:
    return -(-count // shards)


def _share(size: int, shards: int) -> int:
    return -(-size // shards)
