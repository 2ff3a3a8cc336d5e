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
from vz_ray.plan.trained import Trained, trained_of
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

    Raises:
        UserError: See `width_of` and `trained_of`.
    """
    trained = trained_of(shape, learner)
    parts = [
        *_weights(shape, learner, trained, reference),
        *_optimizer(learner, trained),
        *_activations(shape, learner, trained, most),
        Part("CUDA context and NCCL", OUTSIDE, Known.ASSUMED),
    ]
    moving = sum(part.bytes for part in parts if part.when is When.PASS)
    parts.append(Part("allocator's gaps", int(FRAGMENTED * moving), Known.ASSUMED, When.PASS))
    return Footprint("learner", learner.ranks, capacity, tuple(part for part in parts if part.bytes))


def _weights(shape: ModelShape, learner: LearnerConfig, trained: Trained, reference: bool) -> list[Part]:
    """Where all is offloaded, only those that a pass needs at a time, and all while they are loaded."""
    width, whole = width_of(learner), learner.zero_stage < 3
    shards, away = 1 if whole else learner.ranks, learner.offload == "all"
    loaded, parts = width * trained.held, []
    if not away:
        parts.append(Part("weights", _share(width * trained.elements, shards)))
        parts.append(Part("frozen weights", _share(width * trained.frozen, shards)))
        if reference:
            parts.append(Part("reference model", _share(width * shape.parameters, shards)))
            loaded += parts[-1].bytes
    if away or (not whole and learner.ranks > 1):
        gathered = width * min(trained.held, LIVE)
        parts.append(Part("weights gathered for a pass", gathered, Known.ESTIMATE, When.PASS))
    parts.append(Part("whole weights while loading", loaded + OUTSIDE, Known.ESTIMATE, When.LOAD))
    return parts


def _optimizer(learner: LearnerConfig, trained: Trained) -> list[Part]:
    stage, offloaded = learner.zero_stage, learner.offload != "none"
    shards = learner.ranks if stage else 1
    parts = []
    if not offloaded:
        # Without ZeRO the weights are their own master copy.
        master = _share(FP32 * trained.elements, shards)
        parts.append(Part("master weights, float32", master if stage else 0))
        parts.append(Part("two moments, float32", _share(2 * FP32 * trained.elements, shards)))
    parts += _gradients(learner, trained)
    parts.append(_bucket(learner))
    if not offloaded:
        # The gradient in float32 once more, and the square root of the second moment.
        step = _elements(trained.elements, shards)
        if stage == 3:
            step = min(step, SUB_GROUP)
        copies = 2 if stage >= 2 else 1
        parts.append(Part("optimizer at work", copies * FP32 * step, Known.ESTIMATE, When.STEP))
    return parts


def _bucket(learner: LearnerConfig) -> Part:
    """What gradients are reduced in: there from the start at stage 3, while there are any at 1 and 2.

    Stage 1 in bfloat16 has none of its own, unless the optimizer is offloaded.
    """
    stage, width = learner.zero_stage, width_of(learner)
    if stage == 0 or (stage == 1 and width < FP32 and learner.offload == "none"):
        return Part("reduction bucket", 0)
    wide = FP32 if stage == 1 else width
    return Part("reduction bucket", wide * BUCKET, when=When.ALWAYS if stage == 3 else When.PASS)


def _gradients(learner: LearnerConfig, trained: Trained) -> list[Part]:
    """Under ZeRO 0 and 1 whole on every rank, and at stage 1 in the weights' type besides."""
    stage, width, offloaded = learner.zero_stage, width_of(learner), learner.offload != "none"
    if stage == 0:
        return [Part("gradients", FP32 * trained.elements)]
    if stage == 1:
        made = 0 if width == FP32 or offloaded else width * trained.elements
        return [
            Part("gradients, float32", FP32 * trained.elements),
            Part("gradients as they are made", made, Known.EXACT, When.PASS),
        ]
    # Before it is reduced a gradient is whole.
    made, share = width * trained.largest, _share(FP32 * trained.elements, learner.ranks)
    return [
        Part("gradients, float32", 0 if offloaded and stage == 3 else share),
        Part("gradients as they are made", made, Known.ESTIMATE, When.PASS),
    ]


def host_bytes(shape: ModelShape, learner: LearnerConfig, *, reference: bool) -> int:
    """Most host memory of one rank: whole models as they are read, or what is offloaded.

    Decoded frames and features of frozen towers are counted in, the process itself is not.

    Raises:
        UserError: See `width_of` and `trained_of`.
    """
    trained, width = trained_of(shape, learner), width_of(learner)
    reading = width * shape.parameters * (2 if reference else 1)
    # Master weights, two moments and gradients in float32; gradients once more, or the weights in `width`.
    each = 5 * FP32 if learner.zero_stage == 3 else 4 * FP32 + width
    states = 0 if learner.offload == "none" else each * _elements(trained.elements, learner.ranks)
    weights = 0
    if learner.offload == "all":
        # They are there while a reference model is read, too.
        weights = _share(width * trained.held, learner.ranks)
        weights += _share(width * shape.parameters, learner.ranks) if reference else 0
    caches = learner.frame_cache_mib + learner.feature_cache_mib * (reference or not trained.vision)
    return max(reading, states) + weights + caches * (1 << 20)


def _activations(shape: ModelShape, learner: LearnerConfig, trained: Trained, most: Pass) -> list[Part]:
    """Where a part of the vision tower is trained, all of it is counted as if it were."""
    width, again = width_of(learner), learner.gradient_checkpointing
    text, vision = shape.text, shape.vision
    attention = activations.Attention(fused=width < FP32, seen=most.seen)
    kept = activations.text_kept(text, width, most.tokens, checkpointing=again, attention=attention)
    kept += activations.head_kept(text, width, most.sampled)
    pixels = activations.pixel_input(vision, width, most.patches)
    tower, patches = 0, 0
    if trained.vision:
        tower = activations.vision_kept(vision, width, most.patches, checkpointing=again)
        patches = most.patches
    layer = activations.layer_at_work(
        shape, width, most.tokens, patches, checkpointing=again, attention=attention
    )
    if not attention.fused:
        layer += SCORES * FP32 * text.heads * most.pairs
    dropped = most.tokens * (width + 1) * trained.dropped
    if again:
        layer += dropped // text.layers
    else:
        kept += dropped
    logits = activations.logits_at_work(
        text, width, most.sampled, learner.logprob_chunk_tokens, trained=not learner.lora.rank
    )
    if not trained.vision:
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
