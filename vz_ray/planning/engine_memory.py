"""What an engine's GPU holds under vLLM: weights, its key/value cache, and what else it sets aside."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.rollout import EngineConfig
from vz_ray.planning.activation_memory import frozen_tower_bytes
from vz_ray.planning.episode_budget import EpisodeBudget
from vz_ray.planning.gpu_memory import GIB, Certainty, MemoryFootprint, MemoryItem, MemoryPhase
from vz_ray.planning.model_shape import ModelShape

KV_BLOCK_TOKENS = 16
"""Tokens in a block of the key/value cache on GPUs."""
MAX_NUM_BATCHED_TOKENS = 2048
"""vLLM's `max_num_batched_tokens` for engines that are embedded: tokens read in one step."""
CUDA_CONTEXT_BYTES = GIB
"""Assumed of the CUDA context and kernels' workspaces."""
CUDA_GRAPH_BYTES = GIB // 2
"""Assumed of captured graphs, if `enforce_eager` is off."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """One engine.

    Attributes:
        footprint: Of each of its GPUs.
        kv_bytes_per_token: On each GPU.
        kv_tokens: Tokens whose keys and values it can hold; 0 or less where nothing is left for them.
        max_episodes: Whole episodes at their longest, each on its own.
        max_episodes_shared_prefix: The same, where the samples of a task share their prompt.
        min_kv_tokens: Fewest tokens that vLLM starts with: one conversation of `max_model_len`.
        encoder_cache_images: Frames whose features it keeps.
        mm_cache_frames: Preprocessed frames that `mm_cache_gib` holds.
        host_bytes: Bytes of host memory: that cache, in two processes.
    """

    footprint: MemoryFootprint
    kv_bytes_per_token: int
    kv_tokens: int
    max_episodes: int
    max_episodes_shared_prefix: int
    min_kv_tokens: int
    encoder_cache_images: int
    mm_cache_frames: int
    host_bytes: int

    @property
    def can_start(self) -> bool:
        """Whether vLLM accepts it: it refuses a cache that cannot hold one longest conversation."""
        return self.footprint.fits and self.kv_tokens >= self.min_kv_tokens


def engine_memory(
    shape: ModelShape,
    engine: EngineConfig,
    longest: EpisodeBudget,
    capacity: int,
    *,
    num_engines: int,
    group_size: int,
    max_image_pixels: int,
) -> EngineMemory:
    """Of each of `num_engines`.

    Args:
        capacity: Bytes of one GPU.
        group_size: Samples of a task, which are played on one engine.
        max_image_pixels: Largest area that the checkpoint's processor lets through, pixels: vLLM tries one
            such image at the start to see what its encoder takes.
    """
    width, over = 4 if engine.dtype == "float32" else 2, engine.tensor_parallel_size
    parts = _fixed(shape, engine, width, max_image_pixels)
    per_token = 2 * width * shape.text.layers * max(1, shape.text.kv_heads // over) * shape.text.head_dim
    # Graphs are captured after the cache was made, outside of the share that vLLM keeps to.
    within = sum(part.bytes for part in parts if part.name != "captured graphs")
    if engine.kv_cache_gib is None:
        room = int(engine.gpu_memory_utilization * capacity) - within
    else:
        room = int(engine.kv_cache_gib * GIB)
    tokens = max(0, room // (per_token * KV_BLOCK_TOKENS)) * KV_BLOCK_TOKENS
    known = Certainty.ESTIMATE if engine.kv_cache_gib is None else Certainty.EXACT
    parts.append(MemoryItem("key/value cache", tokens * per_token, known))
    frame_bytes = 4 * longest.frame.patches * shape.vision.patch_elements
    return EngineMemory(
        footprint=MemoryFootprint(
            "engine", num_engines * over, capacity, tuple(part for part in parts if part.bytes)
        ),
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        max_episodes=tokens // _blocks(longest.tokens),
        max_episodes_shared_prefix=_shared(tokens, longest, group_size),
        min_kv_tokens=_blocks(engine.max_model_len),
        encoder_cache_images=_encoder_tokens(shape, max_image_pixels) // longest.frame.tokens,
        mm_cache_frames=int(engine.mm_processor_cache_gib * GIB) // frame_bytes,
        host_bytes=2 * int(engine.mm_processor_cache_gib * GIB),
    )


def _fixed(shape: ModelShape, engine: EngineConfig, width: int, largest_image: int) -> list[MemoryItem]:
    """All but the key/value cache."""
    over = engine.tensor_parallel_size
    known = Certainty.EXACT if over == 1 else Certainty.ESTIMATE
    text, vision = shape.text, shape.vision
    units = largest_image // (vision.patch_size * vision.merge_size) ** 2
    reading = width * MAX_NUM_BATCHED_TOKENS * (3 * text.intermediate // over + 4 * text.hidden)
    seeing = frozen_tower_bytes(vision, width, units * vision.merge_size**2) // over
    sampling = 3 * 4 * engine.max_num_seqs * text.vocab_size
    return [
        MemoryItem("weights", -(-width * shape.parameters // over), known),
        MemoryItem(
            "image features (encoder cache)", width * _encoder_tokens(shape, largest_image) * text.hidden
        ),
        MemoryItem("reading and sampling at their most", max(reading, seeing) + sampling, Certainty.ESTIMATE),
        MemoryItem("CUDA context", CUDA_CONTEXT_BYTES, Certainty.ASSUMED),
        MemoryItem(
            "captured graphs",
            0 if engine.enforce_eager else CUDA_GRAPH_BYTES,
            Certainty.ASSUMED,
            MemoryPhase.ALWAYS,
        ),
    ]


def _encoder_tokens(shape: ModelShape, largest_image: int) -> int:
    """Visual tokens whose features vLLM keeps: a step's worth, or one image if that has more."""
    return max(
        MAX_NUM_BATCHED_TOKENS, largest_image // (shape.vision.patch_size * shape.vision.merge_size) ** 2
    )


def _blocks(tokens: int) -> int:
    """Tokens rounded up to whole blocks."""
    return -(-tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def _shared(tokens: int, longest: EpisodeBudget, samples: int) -> int:
    """Episodes that fit where those of a task keep its prompt once, the last task's being fewer."""
    prefix, branch = (
        longest.prefix_tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS,
        _blocks(longest.tokens - longest.prefix_tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS),
    )
    group = prefix + samples * branch
    rest = tokens % group - prefix
    return samples * (tokens // group) + max(0, min(samples, rest // branch))
