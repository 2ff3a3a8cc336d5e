"""What a learner rank's GPU holds under DeepSpeed.

ZeRO's shares as DeepSpeed 0.19 allocates them with the settings of `vz_ray.learner.train_engine`: gradients
add up in float32, one reduction bucket, no overlap of communication.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.learner import LearnerConfig
from vz_ray.planning import activation_memory
from vz_ray.planning.episode_budget import EpisodeBudget
from vz_ray.planning.gpu_memory import GIB, Certainty, MemoryFootprint, MemoryItem, MemoryPhase
from vz_ray.planning.learner_flops import split_group
from vz_ray.planning.model_shape import ModelShape
from vz_ray.planning.trainable_params import TrainableParams, count_trainable_params
from vz_ray.utils.errors import UserError

FP32_BYTES = 4
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size`; allocated whole."""
MAX_LIVE_ELEMENTS = 1_000_000_000
"""Elements of `stage3_max_live_parameters`: weights gathered from other ranks at a time."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""Elements of `sub_group_size`: ZeRO-3 steps through so many at a time."""
ATTENTION_SCORE_COPIES = 4
"""Matrices of queries times keys in float32 that attention works with on GPUs where it is not fused."""
CUDA_AND_NCCL_BYTES = 2 * GIB
"""Assumed of the CUDA context, NCCL's buffers and kernels' workspaces."""
FRAGMENTATION = 0.05
"""Assumed share of what a pass allocates that the allocator holds and cannot use."""


@dataclass(frozen=True, slots=True)
class WorstCaseBatch:
    """The largest micro-batch.

    Attributes:
        tokens: In its one sequence.
        patches: Of distinct frames.
        sampled_tokens: Tokens whose log-probs are wanted.
        attention_pairs: Queries times keys of the largest part that is attended to at a time.
        gathered_keys: Keys per token, where each branch gathers its prefix's.
    """

    tokens: int
    patches: int
    sampled_tokens: int
    attention_pairs: int
    gathered_keys: float


def worst_case_batch(
    learner: LearnerConfig, longest: EpisodeBudget, usual: EpisodeBudget, samples: int
) -> WorstCaseBatch:
    """A full micro-batch of as many frames as so many tokens can hold; how it branches is as usual."""
    tokens = max(learner.micro_batch_tokens, longest.tokens)
    frames = max(longest.frames, tokens // longest.tokens_per_frame)
    sampled = longest.sampled_tokens * max(1, tokens // longest.tokens)
    branches = split_group(usual, samples, tokens)[0] if learner.share_prefixes else 1
    prefix = usual.prefix_tokens if branches > 1 else 0
    own = usual.tokens - prefix
    return WorstCaseBatch(
        tokens=tokens,
        patches=frames * longest.frame.patches,
        sampled_tokens=min(sampled, tokens),
        attention_pairs=max(longest.tokens**2, branches * own * prefix),
        gathered_keys=1 + branches * prefix / (prefix + branches * own),
    )


def weight_bytes_of(learner: LearnerConfig) -> int:
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
    return FP32_BYTES if learner.dtype == "float32" or learner.zero_stage == 0 else 2


def learner_footprint(
    shape: ModelShape, learner: LearnerConfig, most: WorstCaseBatch, capacity: int, *, has_reference: bool
) -> MemoryFootprint:
    """Of one rank's GPU.

    Args:
        most: The largest micro-batch.
        capacity: Bytes of the GPU.
        has_reference: Whether a reference model is held, too.

    Raises:
        UserError: See `width_of` and `trained_of`.
    """
    trained = count_trainable_params(shape, learner)
    parts = [
        *_weights(shape, learner, trained, has_reference),
        *_optimizer(learner, trained),
        *_activations(shape, learner, trained, most),
        MemoryItem("CUDA context and NCCL", CUDA_AND_NCCL_BYTES, Certainty.ASSUMED),
    ]
    moving = sum(part.bytes for part in parts if part.phase is MemoryPhase.FORWARD_BACKWARD)
    parts.append(
        MemoryItem(
            "allocator's gaps", int(FRAGMENTATION * moving), Certainty.ASSUMED, MemoryPhase.FORWARD_BACKWARD
        )
    )
    return MemoryFootprint(
        "learner", learner.world_size, capacity, tuple(part for part in parts if part.bytes)
    )


def _weights(
    shape: ModelShape, learner: LearnerConfig, trained: TrainableParams, reference: bool
) -> list[MemoryItem]:
    """Where all is offloaded, only those that a pass needs at a time, and all while they are loaded."""
    width, whole = weight_bytes_of(learner), learner.zero_stage < 3
    shards, away = 1 if whole else learner.world_size, learner.offload == "all"
    loaded, parts = width * trained.total, []
    if not away:
        parts.append(MemoryItem("weights", _share(width * trained.trainable, shards)))
        parts.append(MemoryItem("frozen weights", _share(width * trained.frozen, shards)))
        if reference:
            parts.append(MemoryItem("reference model", _share(width * shape.parameters, shards)))
            loaded += parts[-1].bytes
    if away or (not whole and learner.world_size > 1):
        gathered = width * min(trained.total, MAX_LIVE_ELEMENTS)
        parts.append(
            MemoryItem(
                "weights gathered for a pass", gathered, Certainty.ESTIMATE, MemoryPhase.FORWARD_BACKWARD
            )
        )
    parts.append(
        MemoryItem(
            "whole weights while loading",
            loaded + CUDA_AND_NCCL_BYTES,
            Certainty.ESTIMATE,
            MemoryPhase.LOADING,
        )
    )
    return parts


def _optimizer(learner: LearnerConfig, trained: TrainableParams) -> list[MemoryItem]:
    stage, offloaded = learner.zero_stage, learner.offload != "none"
    shards = learner.world_size if stage else 1
    parts = []
    if not offloaded:
        # Without ZeRO the weights are their own master copy.
        master = _share(FP32_BYTES * trained.trainable, shards)
        parts.append(MemoryItem("master weights, float32", master if stage else 0))
        parts.append(MemoryItem("two moments, float32", _share(2 * FP32_BYTES * trained.trainable, shards)))
    parts += _gradients(learner, trained)
    parts.append(_bucket(learner))
    if not offloaded:
        # The gradient in float32 once more, and the square root of the second moment.
        step = _elements(trained.trainable, shards)
        if stage == 3:
            step = min(step, SUB_GROUP_ELEMENTS)
        copies = 2 if stage >= 2 else 1
        parts.append(
            MemoryItem(
                "optimizer at work",
                copies * FP32_BYTES * step,
                Certainty.ESTIMATE,
                MemoryPhase.OPTIMIZER_STEP,
            )
        )
    return parts


def _bucket(learner: LearnerConfig) -> MemoryItem:
    """What gradients are reduced in: there from the start at stage 3, while there are any at 1 and 2.

    Stage 1 in bfloat16 has none of its own, unless the optimizer is offloaded.
    """
    stage, width = learner.zero_stage, weight_bytes_of(learner)
    if stage == 0 or (stage == 1 and width < FP32_BYTES and learner.offload == "none"):
        return MemoryItem("reduction bucket", 0)
    wide = FP32_BYTES if stage == 1 else width
    return MemoryItem(
        "reduction bucket",
        wide * REDUCE_BUCKET_ELEMENTS,
        phase=MemoryPhase.ALWAYS if stage == 3 else MemoryPhase.FORWARD_BACKWARD,
    )


def _gradients(learner: LearnerConfig, trained: TrainableParams) -> list[MemoryItem]:
    """Under ZeRO 0 and 1 whole on every rank, and at stage 1 in the weights' type besides."""
    stage, width, offloaded = learner.zero_stage, weight_bytes_of(learner), learner.offload != "none"
    if stage == 0:
        return [MemoryItem("gradients", FP32_BYTES * trained.trainable)]
    if stage == 1:
        made = 0 if width == FP32_BYTES or offloaded else width * trained.trainable
        return [
            MemoryItem("gradients, float32", FP32_BYTES * trained.trainable),
            MemoryItem("gradients as they are made", made, Certainty.EXACT, MemoryPhase.FORWARD_BACKWARD),
        ]
    # Before it is reduced a gradient is whole.
    made, share = width * trained.largest_tensor, _share(FP32_BYTES * trained.trainable, learner.world_size)
    return [
        MemoryItem("gradients, float32", 0 if offloaded and stage == 3 else share),
        MemoryItem("gradients as they are made", made, Certainty.ESTIMATE, MemoryPhase.FORWARD_BACKWARD),
    ]


def learner_host_bytes(shape: ModelShape, learner: LearnerConfig, *, has_reference: bool) -> int:
    """Most host memory of one rank: whole models as they are read, or what is offloaded.

    Decoded frames and features of frozen towers are counted in, the process itself is not.

    Raises:
        UserError: See `width_of` and `trained_of`.
    """
    trained, width = count_trainable_params(shape, learner), weight_bytes_of(learner)
    reading = width * shape.parameters * (2 if has_reference else 1)
    # Master weights, two moments and gradients in float32; gradients once more, or the weights in `width`.
    each = 5 * FP32_BYTES if learner.zero_stage == 3 else 4 * FP32_BYTES + width
    states = 0 if learner.offload == "none" else each * _elements(trained.trainable, learner.world_size)
    weights = 0
    if learner.offload == "all":
        # They are there while a reference model is read, too.
        weights = _share(width * trained.total, learner.world_size)
        weights += _share(width * shape.parameters, learner.world_size) if has_reference else 0
    caches = learner.frame_cache_mib + learner.feature_cache_mib * (has_reference or not trained.vision)
    return max(reading, states) + weights + caches * (1 << 20)


def _activations(
    shape: ModelShape, learner: LearnerConfig, trained: TrainableParams, most: WorstCaseBatch
) -> list[MemoryItem]:
    """Where a part of the vision tower is trained, all of it is counted as if it were."""
    width, again = weight_bytes_of(learner), learner.gradient_checkpointing
    text, vision = shape.text, shape.vision
    attention = activation_memory.AttentionMemory(fused=width < FP32_BYTES, gathered_keys=most.gathered_keys)
    kept = activation_memory.text_saved_bytes(
        text, width, most.tokens, checkpointing=again, attention=attention
    )
    kept += activation_memory.head_saved_bytes(text, width, most.sampled_tokens)
    pixels = activation_memory.pixel_input_bytes(vision, width, most.patches)
    tower, patches = 0, 0
    if trained.vision:
        tower = activation_memory.vision_saved_bytes(vision, width, most.patches, checkpointing=again)
        patches = most.patches
    layer = activation_memory.layer_workspace_bytes(
        shape, width, most.tokens, patches, checkpointing=again, attention=attention
    )
    if not attention.fused:
        layer += ATTENTION_SCORE_COPIES * FP32_BYTES * text.heads * most.attention_pairs
    dropped = most.tokens * (width + 1) * trained.dropout_inputs
    if again:
        layer += dropped // text.layers
    else:
        kept += dropped
    logits = activation_memory.logits_workspace_bytes(
        text, width, most.sampled_tokens, learner.logprob_chunk_tokens, head_trained=not learner.lora.rank
    )
    if not trained.vision:
        layer = max(layer, activation_memory.frozen_tower_bytes(vision, width, most.patches))
    named = {
        "activations, language model": kept,
        "activations, vision tower": tower + pixels,
        # At the end of the forward pass and in the layers' backward pass: never at the same time.
        "logits at work" if logits >= layer else "a layer at work": max(logits, layer),
    }
    return [
        MemoryItem(name, size, Certainty.ESTIMATE, MemoryPhase.FORWARD_BACKWARD)
        for name, size in named.items()
    ]


def _elements(count: int, shards: int) -> int:
    return -(-count // shards)


def _share(size: int, shards: int) -> int:
    return -(-size // shards)
