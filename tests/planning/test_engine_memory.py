"""What an engine holds, at the 7B recipe's numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.planning.engine_memory import KV_BLOCK_TOKENS, EngineMemory, engine_memory
from vz_ray.planning.episode_budget import longest_episode
from vz_ray.planning.gpu_memory import GIB, Certainty
from vz_ray.planning.model_shape import DEFAULT_MAX_PIXELS, KNOWN_SHAPES

SHAPE = KNOWN_SHAPES["Qwen2.5-VL-7B"]
EPISODE = longest_episode(EpisodeConfig(), SHAPE.vision)
ENGINE = EngineConfig(dtype="bfloat16", kv_cache_gib=None, max_num_seqs=64, enforce_eager=False)


def memory(capacity: int = 80 * GIB, **changes: Any) -> EngineMemory:
    return engine_memory(
        SHAPE,
        replace(ENGINE, **changes),
        EPISODE,
        capacity,
        num_engines=8,
        group_size=16,
        max_image_pixels=DEFAULT_MAX_PIXELS,
    )


def part(found: EngineMemory, name: str) -> int:
    return next(part.bytes for part in found.footprint.items if part.name == name)


def test_a_tokens_keys_and_values() -> None:
    # 28 layers, keys and values, 4 heads of 128, 2 bytes.
    assert memory().kv_bytes_per_token == 28 * 2 * 4 * 128 * 2
    assert memory(tensor_parallel=2).kv_bytes_per_token == memory().kv_bytes_per_token // 2
    # There is no less than one head on a GPU.
    assert memory(tensor_parallel=7).kv_bytes_per_token == memory().kv_bytes_per_token // 4


def test_what_vllm_keeps_to_is_shared_out_whole() -> None:
    found = memory()
    within = found.footprint.peak_bytes - part(found, "captured graphs")
    assert 0 <= 0.85 * 80 * GIB - within < KV_BLOCK_TOKENS * found.kv_bytes_per_token
    assert part(found, "weights") == 2 * SHAPE.parameters
    assert found.kv_tokens * found.kv_bytes_per_token == part(found, "key/value cache")


def test_a_fixed_cache_is_exact() -> None:
    found = memory(kv_cache_gib=7.0)
    assert found.kv_tokens == 7 * GIB // (57_344 * KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
    known = {p.name: p.certainty for p in found.footprint.items}
    assert known["key/value cache"] is Certainty.EXACT
    assert known["weights"] is Certainty.EXACT


def test_whole_episodes_alone_and_with_their_prompt_shared() -> None:
    found = memory()
    assert found.max_episodes == found.kv_tokens // EPISODE.tokens
    # A full group's prompt once, and each branch: as many as fit.
    branch = EPISODE.tokens - EPISODE.prefix_tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
    groups, rest = divmod(found.max_episodes_shared_prefix, 16)
    used = groups * (EPISODE.prefix_tokens + 16 * branch) + (
        EPISODE.prefix_tokens + rest * branch if rest else 0
    )
    assert used <= found.kv_tokens < used + EPISODE.prefix_tokens + branch
    assert found.max_episodes_shared_prefix > found.max_episodes


def test_vllm_needs_room_for_one_longest_conversation() -> None:
    assert memory().can_start
    small = memory(capacity=22 * GIB)
    assert small.footprint.fits
    assert small.kv_tokens < small.min_kv_tokens == 32_768
    assert not small.can_start
    assert memory(capacity=22 * GIB, tensor_parallel=2).can_start


def test_the_encoder_keeps_at_least_one_largest_image() -> None:
    found = memory()
    assert part(found, "image features (encoder cache)") == 2 * 16_384 * 3584
    assert found.encoder_cache_images == 128


def test_preprocessed_frames_lie_in_two_processes() -> None:
    found = memory(mm_cache_gib=8.0)
    # 512 patches of 1,176 float32: the 2.4 MB that the config speaks of.
    assert found.mm_cache_frames == 8 * GIB // (512 * 1176 * 4)
    assert found.host_bytes == 16 * GIB
    assert 2.3e6 < 512 * 1176 * 4 < 2.5e6


@pytest.mark.parametrize("capacity", [10 * GIB, 18 * GIB])
def test_a_gpu_below_the_weights_has_no_cache(capacity: int) -> None:
    found = memory(capacity=capacity)
    assert found.kv_tokens == found.max_episodes == 0
    assert not found.can_start
