"""GPU memory of a vLLM engine: weights, KV cache and workspaces."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.rollout import EngineConfig
from vz_ray.families import ModelShape, TextShape
from vz_ray.planning.activation_memory import block_mlp_bytes
from vz_ray.planning.episode_budget import EpisodeBudget
from vz_ray.planning.gpu_memory import GIB, Certainty, MemoryFootprint, MemoryItem
from vz_ray.planning.kv_cache import KvCacheLayout
from vz_ray.planning.published_weights import adapter_slot_elements

MAX_NUM_BATCHED_TOKENS = 2048
"""vLLM's default `max_num_batched_tokens` for embedded engines: prefill tokens per step."""
CUDA_CONTEXT_BYTES = GIB
"""Assumed memory of the CUDA context and kernel workspaces."""
CUDA_GRAPH_BYTES = GIB // 2
"""Assumed memory of CUDA graphs if `enforce_eager` is off."""
CUDA_GRAPHS = "CUDA graphs"
"""Name of the item for CUDA graphs."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Memory and capacity of one engine.

    Attributes:
        footprint: Memory of each GPU.
        kv_bytes_per_token: KV cache bytes per token on each GPU.
        kv_tokens: Tokens that fit the KV cache without states of linear attention; 0 if no memory is left.
        state_tokens: Tokens whose place in the KV cache the states of one sequence take.
        max_episodes: Longest episodes that fit the KV cache without prefix sharing.
        max_episodes_shared_prefix: The same if the samples of a group share their prompt.
        min_kv_tokens: Minimum KV cache with which vLLM starts: one conversation of `max_model_len`.
        encoder_cache_images: Frames whose features fit the encoder cache.
        mm_cache_frames: Preprocessed frames that fit the multimodal processor cache.
        host_bytes: Host memory of that cache, which exists in two processes.
    """

    footprint: MemoryFootprint
    kv_bytes_per_token: int
    kv_tokens: int
    state_tokens: int
    max_episodes: int
    max_episodes_shared_prefix: int
    min_kv_tokens: int
    encoder_cache_images: int
    mm_cache_frames: int
    host_bytes: int

    @property
    def bytes_over(self) -> int:
        """Bytes that a GPU lacks for the engine to start; negative if memory is left."""
        return max(self.footprint.bytes_over, (self.min_kv_tokens - self.kv_tokens) * self.kv_bytes_per_token)

    @property
    def can_start(self) -> bool:
        """Whether vLLM starts: it rejects a KV cache below one conversation of `max_model_len`."""
        return self.footprint.fits and self.kv_tokens >= self.min_kv_tokens


def engine_memory(
    shape: ModelShape,
    engine: EngineConfig,
    longest: EpisodeBudget,
    gpu_bytes: int,
    *,
    num_engines: int,
    group_size: int,
    max_image_pixels: int,
) -> EngineMemory:
    """Return the memory of each engine.

    Args:
        shape: Shape of the model.
        engine: Config of the engine.
        longest: The longest episode.
        gpu_bytes: Memory of one GPU.
        num_engines: Number of engines.
        group_size: Samples of a group, which run on one engine.
        max_image_pixels: Maximum image area of the checkpoint's processor. At startup vLLM profiles the
            encoder with one such image.
    """
    dtype_bytes, shards = 4 if engine.dtype == "float32" else 2, engine.tensor_parallel_size
    items = _fixed_items(shape, engine, dtype_bytes, max_image_pixels)
    layout = KvCacheLayout.of(shape.text, dtype_bytes, shards)
    # vLLM captures graphs after it allocates the KV cache, outside `gpu_memory_utilization`.
    within_limit = sum(item.bytes for item in items if item.name != CUDA_GRAPHS)
    if engine.kv_cache_gib is None:
        kv_bytes = int(engine.gpu_memory_utilization * gpu_bytes) - within_limit
        certainty = Certainty.ESTIMATE
    else:
        kv_bytes = int(engine.kv_cache_gib * GIB)
        certainty = Certainty.EXACT
    blocks = max(0, kv_bytes // layout.block_bytes)
    items.append(MemoryItem("KV cache", blocks * layout.block_bytes, certainty))
    frame_bytes = 4 * longest.frame.patches * shape.vision.patch_elements
    mm_cache_bytes = int(engine.mm_processor_cache_gib * GIB)
    return EngineMemory(
        footprint=MemoryFootprint(
            "engine", num_engines * shards, gpu_bytes, tuple(item for item in items if item.bytes)
        ),
        kv_bytes_per_token=layout.token_groups * layout.block_bytes // layout.block_tokens,
        kv_tokens=layout.tokens(blocks),
        state_tokens=layout.tokens(layout.state_blocks),
        max_episodes=blocks // layout.sequence_blocks(longest.tokens),
        max_episodes_shared_prefix=layout.shared_sequences(blocks, longest.tokens, longest.prefix_tokens, group_size),
        min_kv_tokens=layout.tokens(layout.sequence_blocks(engine.max_model_len)),
        encoder_cache_images=_encoder_tokens(shape, max_image_pixels) // longest.frame.tokens,
        mm_cache_frames=mm_cache_bytes // frame_bytes,
        host_bytes=2 * mm_cache_bytes,
    )


def _fixed_items(shape: ModelShape, engine: EngineConfig, dtype_bytes: int, max_image_pixels: int) -> list[MemoryItem]:
    """Return all items but the KV cache."""
    shards = engine.tensor_parallel_size
    text, vision = shape.text, shape.vision
    visual_tokens = max_image_pixels // vision.token_side**2
    elements = max(_mlp_workspace(text, shards, experts=kind) for kind in text.mlp_kinds)
    prefill = dtype_bytes * MAX_NUM_BATCHED_TOKENS * (elements + 4 * text.hidden)
    # vLLM's rotary embedding has no float32 copies: the MLP is the maximum.
    encoder = visual_tokens * vision.merge_size**2 * block_mlp_bytes(vision, dtype_bytes) // shards
    sampling = 3 * 4 * engine.max_num_seqs * text.vocab_size
    deepstack = dtype_bytes * len(vision.deepstack_blocks) * MAX_NUM_BATCHED_TOKENS * text.hidden
    features = dtype_bytes * _encoder_tokens(shape, max_image_pixels) * vision.feature_levels * text.hidden
    return [
        MemoryItem(
            "weights",
            -(-dtype_bytes * shape.parameters // shards),
            Certainty.EXACT if shards == 1 else Certainty.ESTIMATE,
        ),
        MemoryItem("adapter", -(-dtype_bytes * adapter_slot_elements(shape, engine) // shards), Certainty.ESTIMATE),
        MemoryItem("encoder cache", features),
        MemoryItem("deepstack buffers", deepstack),
        MemoryItem("prefill and sampling workspace", max(prefill, encoder) + sampling, Certainty.ESTIMATE),
        MemoryItem("CUDA context", CUDA_CONTEXT_BYTES, Certainty.ASSUMED),
        MemoryItem(CUDA_GRAPHS, 0 if engine.enforce_eager else CUDA_GRAPH_BYTES, Certainty.ASSUMED),
    ]


def _mlp_workspace(text: TextShape, shards: int, *, experts: bool) -> int:
    """Return the elements per token of an MLP's intermediates, or of the intermediates and outputs of its experts."""
    if experts and text.experts:
        return 3 * text.experts.token_intermediate // shards + text.experts.per_token * text.hidden
    return 3 * text.intermediate // shards


def _encoder_tokens(shape: ModelShape, max_image_pixels: int) -> int:
    """Return the visual tokens of the encoder cache: one step's tokens, or one image if it is larger."""
    return max(MAX_NUM_BATCHED_TOKENS, max_image_pixels // shape.vision.token_side**2)
