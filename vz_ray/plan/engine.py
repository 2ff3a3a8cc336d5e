"""What an engine's GPU holds under vLLM: weights, its key/value cache, and what else it sets aside."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.rollout import EngineConfig
from vz_ray.plan.activations import frozen_tower
from vz_ray.plan.budget import EpisodeBudget
from vz_ray.plan.memory import GIB, Footprint, Known, Part, When
from vz_ray.plan.shape import ModelShape

BLOCK = 16
"""Tokens in a block of the key/value cache on GPUs."""
BATCHED_TOKENS = 2048
"""vLLM's `max_num_batched_tokens` for engines that are embedded: tokens read in one step."""
CONTEXT = GIB
"""Assumed of the CUDA context and kernels' workspaces."""
GRAPHS = GIB // 2
"""Assumed of captured graphs, if `enforce_eager` is off."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """One engine.

    Attributes:
        footprint: Of each of its GPUs.
        kv_bytes_per_token: On each GPU.
        kv_tokens: Tokens whose keys and values it can hold; 0 or less where nothing is left for them.
        episodes: Whole episodes at their longest, each on its own.
        shared: The same, where the samples of a task share their prompt.
        needed: Fewest tokens that vLLM starts with: one conversation of `max_model_len`.
        encoder_images: Frames whose features it keeps.
        cached_frames: Preprocessed frames that `mm_cache_gib` holds.
        host: Bytes of host memory: that cache, in two processes.
    """

    footprint: Footprint
    kv_bytes_per_token: int
    kv_tokens: int
    episodes: int
    shared: int
    needed: int
    encoder_images: int
    cached_frames: int
    host: int

    @property
    def starts(self) -> bool:
        """Whether vLLM accepts it: it refuses a cache that cannot hold one longest conversation."""
        return self.footprint.fits and self.kv_tokens >= self.needed


def engine_memory(
    shape: ModelShape,
    engine: EngineConfig,
    longest: EpisodeBudget,
    capacity: int,
    *,
    engines: int,
    samples: int,
    largest_image: int,
) -> EngineMemory:
    """Of each of `engines`.

    Args:
        capacity: Bytes of one GPU.
        samples: Samples of a task, which are played on one engine.
        largest_image: Largest area that the checkpoint's processor lets through, pixels: vLLM tries one
            such image at the start to see what its encoder takes.
    """
    width, over = 4 if engine.dtype == "float32" else 2, engine.tensor_parallel
    parts = _fixed(shape, engine, width, largest_image)
    per_token = 2 * width * shape.text.layers * max(1, shape.text.kv_heads // over) * shape.text.head
    # Graphs are captured after the cache was made, outside of the share that vLLM keeps to.
    within = sum(part.bytes for part in parts if part.name != "captured graphs")
    if engine.kv_cache_gib is None:
        room = int(engine.gpu_memory * capacity) - within
    else:
        room = int(engine.kv_cache_gib * GIB)
    tokens = max(0, room // (per_token * BLOCK)) * BLOCK
    known = Known.ESTIMATE if engine.kv_cache_gib is None else Known.EXACT
    parts.append(Part("key/value cache", tokens * per_token, known))
    frame_bytes = 4 * longest.frame.patches * shape.vision.patch_elements
    return EngineMemory(
        footprint=Footprint("engine", engines * over, capacity, tuple(part for part in parts if part.bytes)),
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        episodes=tokens // _blocks(longest.tokens),
        shared=_shared(tokens, longest, samples),
        needed=_blocks(engine.max_model_len),
        encoder_images=_encoder_tokens(shape, largest_image) // longest.frame.tokens,
        cached_frames=int(engine.mm_cache_gib * GIB) // frame_bytes,
        host=2 * int(engine.mm_cache_gib * GIB),
    )


def _fixed(shape: ModelShape, engine: EngineConfig, width: int, largest_image: int) -> list[Part]:
    """All but the key/value cache."""
    over = engine.tensor_parallel
    known = Known.EXACT if over == 1 else Known.ESTIMATE
    text, vision = shape.text, shape.vision
    units = largest_image // (vision.patch * vision.merge) ** 2
    reading = width * BATCHED_TOKENS * (3 * text.intermediate // over + 4 * text.hidden)
    seeing = frozen_tower(vision, width, units * vision.merge**2) // over
    sampling = 3 * 4 * engine.max_num_seqs * text.vocab
    return [
        Part("weights", -(-width * shape.parameters // over), known),
        Part("image features (encoder cache)", width * _encoder_tokens(shape, largest_image) * text.hidden),
        Part("reading and sampling at their most", max(reading, seeing) + sampling, Known.ESTIMATE),
        Part("CUDA context", CONTEXT, Known.ASSUMED),
        Part("captured graphs", 0 if engine.enforce_eager else GRAPHS, Known.ASSUMED, When.ALWAYS),
    ]


def _encoder_tokens(shape: ModelShape, largest_image: int) -> int:
    """Visual tokens whose features vLLM keeps: a step's worth, or one image if that has more."""
    return max(BATCHED_TOKENS, largest_image // (shape.vision.patch * shape.vision.merge) ** 2)


def _blocks(tokens: int) -> int:
    """Tokens rounded up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


def _shared(tokens: int, longest: EpisodeBudget, samples: int) -> int:
    """Episodes that fit where those of a task keep its prompt once, the last task's being fewer."""
    prefix, branch = (
        longest.prefix // BLOCK * BLOCK,
        _blocks(longest.tokens - longest.prefix // BLOCK * BLOCK),
    )
    group = prefix + samples * branch
    rest = tokens % group - prefix
    return samples * (tokens // group) + max(0, min(samples, rest // branch))
