"""GPU and host memory of a learner rank under DeepSpeed.

ZeRO partitions as DeepSpeed 0.19 allocates them with the settings of `vz_ray.learner.train_engine`: float32
gradient accumulation, fused AdamW; communication overlaps with computation from stage 2 on.
"""

from __future__ import annotations

from vz_ray.config.learner import LearnerConfig
from vz_ray.families import ModelShape
from vz_ray.planning.activation_memory import FP32_BYTES
from vz_ray.planning.episode_budget import EpisodeBudget
from vz_ray.planning.gpu_memory import GIB, Certainty, MemoryFootprint, MemoryItem, MemoryPhase
from vz_ray.planning.learner_activations import WorstCaseBatch, activation_items
from vz_ray.planning.learner_flops import split_group
from vz_ray.planning.trainable_params import TrainableParams, count_trainable_params
from vz_ray.utils.errors import UserError

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`; allocated as a whole."""
MAX_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: maximum of weights gathered at a time."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's `sub_group_size`: elements of one ZeRO-3 optimizer sub-step."""
CUDA_AND_NCCL_BYTES = 2 * GIB
"""Assumed memory of the CUDA context, NCCL buffers and kernel workspaces."""
FRAGMENTATION = 0.05
"""Assumed fraction of forward and backward allocations that is lost to fragmentation."""


def worst_case_batch(
    learner: LearnerConfig, longest: EpisodeBudget, typical: EpisodeBudget, group_size: int
) -> WorstCaseBatch:
    """Return a full micro-batch with the maximum number of frames, and branches of typical episodes.

    If ranks share the sequence, one of them can hold mostly frames, and one all sampled tokens.
    """
    tokens = max(learner.micro_batch_tokens, longest.tokens)
    frames = max(longest.frames, tokens // longest.tokens_per_frame)
    sampled_tokens = longest.sampled_tokens * max(1, tokens // longest.tokens)
    branches = split_group(typical, group_size, tokens)[0] if learner.share_prefixes else 1
    prefix = typical.prefix_tokens if branches > 1 else 0
    branch = typical.tokens - prefix
    ranks = learner.sequence_parallel_size
    own_tokens = _ceil_div(tokens, ranks)
    if ranks > 1:
        # The first and the last frame can be partly on the neighbouring ranks.
        frames = min(frames, own_tokens // longest.tokens_per_frame + 2)
    return WorstCaseBatch(
        tokens=own_tokens,
        patches=frames * longest.frame.patches,
        sampled_tokens=min(sampled_tokens, own_tokens),
        attention_pairs=max(longest.tokens**2, branches * branch * prefix) // ranks,
        gathered_keys=1 + branches * prefix / (prefix + branches * branch),
    )


def weight_dtype_bytes(learner: LearnerConfig) -> int:
    """Return the bytes of a weight on a GPU.

    `auto` is bfloat16, except at ZeRO stage 0, which trains float32 only.

    Raises:
        UserError: `dtype` is bfloat16 at stage 0, which the learner rejects.
    """
    if learner.dtype == "bfloat16" and learner.zero_stage == 0:
        raise UserError(
            "learner.zero_stage is 0 with learner.dtype=bfloat16; stage 0 has no float32 master weights. "
            "Set learner.zero_stage to 1, 2 or 3"
        )
    return FP32_BYTES if learner.dtype == "float32" or learner.zero_stage == 0 else 2


def learner_footprint(
    shape: ModelShape,
    learner: LearnerConfig,
    batch: WorstCaseBatch,
    gpu_bytes: int,
    *,
    has_reference: bool,
) -> MemoryFootprint:
    """Return the memory of one rank's GPU.

    Args:
        shape: Shape of the model.
        learner: Config of the learner.
        batch: The largest micro-batch.
        gpu_bytes: Memory of the GPU.
        has_reference: Whether the rank holds a reference model.

    Raises:
        UserError: See `weight_dtype_bytes` and `count_trainable_params`.
    """
    params = count_trainable_params(shape, learner)
    items = [
        *_weights(shape, learner, params, has_reference),
        *_optimizer(learner, params),
        *activation_items(shape, learner, params, batch, weight_dtype_bytes(learner)),
        MemoryItem("CUDA context and NCCL", CUDA_AND_NCCL_BYTES, Certainty.ASSUMED),
    ]
    temporary = sum(item.bytes for item in items if item.phase is MemoryPhase.FORWARD_BACKWARD)
    fragmentation = int(FRAGMENTATION * temporary)
    items.append(_temporary("allocator fragmentation", fragmentation, Certainty.ASSUMED))
    return MemoryFootprint("learner", learner.world_size, gpu_bytes, tuple(item for item in items if item.bytes))


def _temporary(name: str, size: int, certainty: Certainty = Certainty.ESTIMATE) -> MemoryItem:
    """Return an item of the forward and backward pass."""
    return MemoryItem(name, size, certainty, MemoryPhase.FORWARD_BACKWARD)


def _weights(
    shape: ModelShape, learner: LearnerConfig, params: TrainableParams, has_reference: bool
) -> list[MemoryItem]:
    """Return the weights. With `offload: all` only gathered weights are on the GPU, and all while loading."""
    dtype_bytes, partitioned = weight_dtype_bytes(learner), learner.zero_stage == 3
    shards, offloaded = learner.world_size if partitioned else 1, learner.offload == "all"
    loading, items = dtype_bytes * params.total, []
    if not offloaded:
        items.append(MemoryItem("weights", _ceil_div(dtype_bytes * params.trainable, shards)))
        items.append(MemoryItem("frozen weights", _ceil_div(dtype_bytes * params.frozen, shards)))
        if has_reference:
            items.append(MemoryItem("reference model", _ceil_div(dtype_bytes * shape.parameters, shards)))
            loading += items[-1].bytes
    if offloaded or (partitioned and learner.world_size > 1):
        items.append(_temporary("gathered weights", dtype_bytes * min(params.total, MAX_LIVE_ELEMENTS)))
    loading += CUDA_AND_NCCL_BYTES
    items.append(MemoryItem("full weights while loading", loading, Certainty.ESTIMATE, MemoryPhase.LOADING))
    return items


def _optimizer(learner: LearnerConfig, params: TrainableParams) -> list[MemoryItem]:
    stage, offloaded = learner.zero_stage, learner.offload != "none"
    shards = learner.world_size if stage else 1
    items = []
    if not offloaded:
        # Without ZeRO the float32 weights are the master weights.
        master = _ceil_div(FP32_BYTES * params.trainable, shards)
        moments = _ceil_div(2 * FP32_BYTES * params.trainable, shards)
        items.append(MemoryItem("master weights, float32", master if stage else 0))
        items.append(MemoryItem("optimizer moments, float32", moments))
    items += _gradients(learner, params)
    items.append(_bucket(learner))
    if not offloaded and stage >= 2:
        # A float32 copy of the gradient; the fused optimizer has no temporary tensors.
        elements = _ceil_div(params.trainable, shards)
        if stage == 3:
            elements = min(elements, SUB_GROUP_ELEMENTS)
        size = FP32_BYTES * elements
        items.append(MemoryItem("optimizer workspace", size, Certainty.ESTIMATE, MemoryPhase.OPTIMIZER_STEP))
    return items


def _bucket(learner: LearnerConfig) -> MemoryItem:
    """Return the reduction bucket: permanent at stage 3, during the backward pass at stages 1 and 2.

    Stage 1 in bfloat16 without offloading has no separate bucket. Stage 2 has two on several ranks: one is
    filled while the other is reduced.
    """
    stage, dtype_bytes = learner.zero_stage, weight_dtype_bytes(learner)
    if stage == 0 or (stage == 1 and dtype_bytes < FP32_BYTES and learner.offload == "none"):
        return MemoryItem("reduction bucket", 0)
    element_bytes = FP32_BYTES if stage == 1 else dtype_bytes
    buckets = 2 if stage == 2 and learner.world_size > 1 else 1
    return MemoryItem(
        "reduction bucket",
        buckets * element_bytes * REDUCE_BUCKET_ELEMENTS,
        phase=MemoryPhase.ALWAYS if stage == 3 else MemoryPhase.FORWARD_BACKWARD,
    )


def _gradients(learner: LearnerConfig, params: TrainableParams) -> list[MemoryItem]:
    """Return gradients: unpartitioned at stages 0 and 1; stage 1 has a copy in the weights' dtype."""
    stage, dtype_bytes = learner.zero_stage, weight_dtype_bytes(learner)
    offloaded = learner.offload != "none"
    if stage == 0:
        return [MemoryItem("gradients", FP32_BYTES * params.trainable)]
    if stage == 1:
        copies = 0 if dtype_bytes == FP32_BYTES or offloaded else dtype_bytes * params.trainable
        return [
            MemoryItem("gradients, float32", FP32_BYTES * params.trainable),
            _temporary("gradients before reduction", copies, Certainty.EXACT),
        ]
    # A gradient is unpartitioned until it is reduced.
    shard = _ceil_div(FP32_BYTES * params.trainable, learner.world_size)
    return [
        MemoryItem("gradients, float32", 0 if offloaded and stage == 3 else shard),
        _temporary("gradients before reduction", dtype_bytes * params.largest_tensor),
    ]


def snapshot_bytes(params: TrainableParams, learner: LearnerConfig) -> int:
    """Return the host memory of a rank's copy of the state before a step of several updates (`StepSnapshot`)."""
    ranks = learner.world_size if learner.zero_stage else 1
    return 3 * FP32_BYTES * _ceil_div(params.trainable, ranks)


def learner_host_bytes(shape: ModelShape, learner: LearnerConfig, *, has_reference: bool) -> int:
    """Return the maximum host memory of one rank: models while loading, or offloaded states.

    Caches of decoded frames and vision features are included; the process itself is not.

    Raises:
        UserError: See `weight_dtype_bytes` and `count_trainable_params`.
    """
    params, dtype_bytes = count_trainable_params(shape, learner), weight_dtype_bytes(learner)
    loading = dtype_bytes * shape.parameters * (2 if has_reference else 1)
    # Master weights, two moments and gradients in float32; plus another gradient (stage 3) or the weights.
    state_bytes = 5 * FP32_BYTES if learner.zero_stage == 3 else 4 * FP32_BYTES + dtype_bytes
    elements = _ceil_div(params.trainable, learner.world_size)
    states = 0 if learner.offload == "none" else state_bytes * elements
    weights = 0
    if learner.offload == "all":
        # Offloaded weights are already in host memory while the reference model loads.
        weights = _ceil_div(dtype_bytes * params.total, learner.world_size)
        weights += _ceil_div(dtype_bytes * shape.parameters, learner.world_size) if has_reference else 0
    feature_cache = learner.feature_cache_mib * (has_reference or not params.vision) << 20
    return max(loading, states) + weights + learner.frame_cache_bytes + feature_cache


def _ceil_div(size: int, shards: int) -> int:
    return -(-size // shards)
