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
from vz_ray.plan.work import packs

FP32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size`; allocated whole."""
LIVE = 1_000_000_000
"""Elements of `stage3_max_live_parameters`: weights gathered from other ranks at a time."""
SUB_GROUP = 1_000_000_000
"""Elements of `sub_group_size`: ZeRO-3 steps through so many at a time."""
SCORES = 4
"""Matrices of queries times keys in float32 that attention works with on GPUs where it is not fused."""
OUTSIDE = 2 * GIB
"""Assumed of the CUDA context, NCCL's buffers and kernels' workspaces."""
FRAGMENTED = 0.05
"""Assumed share of what a pass allocates that the allocator holds and cannot use."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The largest micro-batch.

    Attributes:
        tokens: In its one sequence.
        patches: Of distinct frames.
        sampled: Tokens whose log-probs are wanted.
        pairs: Queries times keys of the largest part that is attended to at a time.
        seen: Keys per token, where each branch gathers its prefix's.
    """

    tokens: int
    patches: int
    sampled: int
    pairs: int
    seen: float


def largest_pass(learner: LearnerConfig, longest: EpisodeBudget, usual: EpisodeBudget, samples: int) -> Pass:
    """A full micro-batch of as many frames as so many tokens can hold; how it branches is as usual."""
    tokens = max(learner.micro_batch_tokens, longest.tokens)
    frames = max(longest.frames, tokens // longest.slot)
    sampled = longest.sampled * max(1, tokens // longest.tokens)
    branches = packs(usual, samples, tokens)[0] if learner.share_prefixes else 1
    prefix = usual.prefix if branches > 1 else 0
    own = usual.tokens - prefix
    return Pass(
        tokens=tokens,
        patches=frames * longest.frame.patches,
        sampled=min(sampled, tokens),
        pairs=max(longest.tokens**2, branches * own * prefix),
        seen=1 + branches * prefix / (prefix + branches * own),
    )


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
    shape: ModelShape, learner: LearnerConfig, most: Pass, capacity: int, *, reference: bool
) -> Footprint:
    """Of one rank's GPU.

    Args:
        most: The largest micro-batch.
        capacity: Bytes of the GPU.
        reference: Whether a reference model is held, too.
    """
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
        # Without ZeRO the weights are their own master copy.
        parts.append(Part("master weights, float32", _share(FP32 * trained, shards) if stage else 0))
        parts.append(Part("two moments, float32", _share(2 * FP32 * trained, shards)))
    parts += _gradients(shape, learner, width, trained)
    parts.append(_bucket(learner, width))
    if not learner.offload:
        # The gradient in float32 once more, and the square root of the second moment.
        step = min(_elements(trained, shards), SUB_GROUP if stage == 3 else trained)
        copies = 2 if stage >= 2 else 1
        parts.append(Part("optimizer at work", copies * FP32 * step, Known.ESTIMATE, When.STEP))
    return parts


def _bucket(learner: LearnerConfig, width: int) -> Part:
    """What gradients are reduced in: there from the start at stage 3, while there are any at 1 and 2.

    Stage 1 in bfloat16 has none of its own, unless the optimizer is offloaded.
    """
    stage = learner.zero_stage
    if stage == 0 or (stage == 1 and width < FP32 and not learner.offload):
        return Part("reduction bucket", 0)
    wide = FP32 if stage == 1 else width
    return Part("reduction bucket", wide * BUCKET, when=When.ALWAYS if stage == 3 else When.PASS)


def _gradients(shape: ModelShape, learner: LearnerConfig, width: int, trained: int) -> list[Part]:
    """Under ZeRO 0 and 1 whole on every rank, and at stage 1 in `width` besides."""
    stage, share = learner.zero_stage, _share(FP32 * trained, learner.ranks)
    if stage == 0:
        return [Part("gradients", FP32 * trained)]
    if stage == 1:
        made = 0 if width == FP32 or learner.offload else width * trained
        return [
            Part("gradients, float32", FP32 * trained),
            Part("gradients as they are made", made, Known.EXACT, When.PASS),
        ]
    # Before it is reduced a gradient is whole: the largest is the embedding's.
    made = width * shape.text.vocab * shape.text.hidden
    return [
        Part("gradients, float32", 0 if learner.offload and stage == 3 else share),
        Part("gradients as they are made", made, Known.ESTIMATE, When.PASS),
    ]


def host_bytes(shape: ModelShape, learner: LearnerConfig, *, reference: bool) -> int:
    """Most host memory of one rank: whole models as they are read, or offloaded optimizer state.

    Decoded frames and features of frozen towers are counted in, the process itself is not.
    """
    reading = width_of(learner) * shape.parameters * (2 if reference else 1)
    # Master weights, two moments and gradients in float32; gradients once more, or the weights in `width`.
    each = 5 * FP32 if learner.zero_stage == 3 else 4 * FP32 + width_of(learner)
    offloaded = each * _elements(trained_elements(shape, learner), learner.ranks)
    caches = learner.frame_cache_mib + learner.feature_cache_mib * (reference or learner.freeze_vision)
    return max(reading, offloaded if learner.offload else 0) + caches * (1 << 20)


def _activations(shape: ModelShape, learner: LearnerConfig, most: Pass) -> list[Part]:
    width, again = width_of(learner), learner.gradient_checkpointing
    text, vision = shape.text, shape.vision
    attention = activations.Attention(fused=width < FP32, seen=most.seen)
    kept = activations.text_kept(text, width, most.tokens, checkpointing=again, attention=attention)
    kept += activations.head_kept(text, width, most.sampled)
    pixels = activations.pixel_input(vision, width, most.patches)
    if learner.freeze_vision:
        tower, patches = 0, 0
    else:
        tower = activations.vision_kept(vision, width, most.patches, checkpointing=again)
        patches = most.patches
    layer = activations.layer_at_work(
        shape, width, most.tokens, patches, checkpointing=again, attention=attention
    )
    if not attention.fused:
        layer += SCORES * FP32 * text.heads * most.pairs
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
