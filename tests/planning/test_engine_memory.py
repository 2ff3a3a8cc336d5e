"""Engine memory at the shapes of the 7B recipe, and KV cache layouts against vLLM's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.families import load_model_shape, processor_max_pixels
from vz_ray.planning.engine_memory import EngineMemory, engine_memory
from vz_ray.planning.episode_budget import longest_episode
from vz_ray.planning.gpu_memory import GIB, Certainty
from vz_ray.planning.kv_cache import KERNEL_BLOCK_TOKENS, KvCacheLayout, layer_state_bytes

SHAPE = load_model_shape("Qwen2.5-VL-7B")
EPISODE = longest_episode(EpisodeConfig(), SHAPE.vision)
EPISODE_35 = longest_episode(EpisodeConfig(), load_model_shape("Qwen3.5-4B").vision)
ENGINE = EngineConfig(dtype="bfloat16", kv_cache_gib=None, max_num_seqs=64, enforce_eager=False)


def plan_engine(gpu_bytes: int = 80 * GIB, model: str = "Qwen2.5-VL-7B", **changes: Any) -> EngineMemory:
    shape = load_model_shape(model)
    return engine_memory(
        shape,
        replace(ENGINE, **changes),
        longest_episode(EpisodeConfig(), shape.vision),
        gpu_bytes,
        num_engines=8,
        group_size=16,
        max_image_pixels=processor_max_pixels(model),
    )


def item_bytes(memory: EngineMemory, name: str) -> int:
    return next(item.bytes for item in memory.footprint.items if item.name == name)


def test_kv_bytes_per_token() -> None:
    # 28 layers, keys and values, 4 heads of 128, 2 bytes.
    assert plan_engine().kv_bytes_per_token == 28 * 2 * 4 * 128 * 2
    assert plan_engine(tensor_parallel_size=2).kv_bytes_per_token == plan_engine().kv_bytes_per_token // 2
    # A GPU holds at least one head.
    assert plan_engine(tensor_parallel_size=7).kv_bytes_per_token == plan_engine().kv_bytes_per_token // 4


def test_kv_cache_uses_all_memory_within_utilization() -> None:
    engine = plan_engine()
    within_limit = engine.footprint.peak_bytes - item_bytes(engine, "CUDA graphs")
    assert 0 <= 0.85 * 80 * GIB - within_limit < KERNEL_BLOCK_TOKENS * engine.kv_bytes_per_token
    assert item_bytes(engine, "weights") == 2 * SHAPE.parameters
    assert engine.kv_tokens * engine.kv_bytes_per_token == item_bytes(engine, "KV cache")


def test_fixed_kv_cache_is_exact() -> None:
    engine = plan_engine(kv_cache_gib=7.0)
    assert engine.kv_tokens == 7 * GIB // (57_344 * KERNEL_BLOCK_TOKENS) * KERNEL_BLOCK_TOKENS
    certainty = {item.name: item.certainty for item in engine.footprint.items}
    assert certainty["KV cache"] is Certainty.EXACT
    assert certainty["weights"] is Certainty.EXACT


def test_max_episodes_with_and_without_shared_prefix() -> None:
    engine = plan_engine()
    assert engine.max_episodes == engine.kv_tokens // EPISODE.tokens
    # Each group stores its prompt once, plus one branch per sample.
    branch = EPISODE.tokens - EPISODE.prefix_tokens // KERNEL_BLOCK_TOKENS * KERNEL_BLOCK_TOKENS
    groups, remaining = divmod(engine.max_episodes_shared_prefix, 16)
    used = groups * (EPISODE.prefix_tokens + 16 * branch) + (
        EPISODE.prefix_tokens + remaining * branch if remaining else 0
    )
    assert used <= engine.kv_tokens < used + EPISODE.prefix_tokens + branch
    assert engine.max_episodes_shared_prefix > engine.max_episodes


def test_engine_needs_kv_cache_for_one_conversation() -> None:
    assert plan_engine().can_start
    small = plan_engine(gpu_bytes=22 * GIB)
    assert small.footprint.fits
    assert small.kv_tokens < small.min_kv_tokens == 32_768
    assert not small.can_start
    assert plan_engine(gpu_bytes=22 * GIB, tensor_parallel_size=2).can_start


def test_encoder_cache_holds_the_largest_image() -> None:
    engine = plan_engine()
    assert item_bytes(engine, "encoder cache") == 2 * 16_384 * 3584
    assert engine.encoder_cache_images == 128


def test_preprocessed_frames_are_cached_in_two_processes() -> None:
    engine = plan_engine(mm_processor_cache_gib=8.0)
    # 512 patches of 1,176 float32 values: the 2.4 MB in the config's comment.
    assert engine.mm_cache_frames == 8 * GIB // (512 * 1176 * 4)
    assert engine.host_bytes == 16 * GIB
    assert 2.3e6 < 512 * 1176 * 4 < 2.5e6


@pytest.mark.parametrize("gpu_bytes", [10 * GIB, 18 * GIB])
def test_gpu_smaller_than_the_weights_has_no_kv_cache(gpu_bytes: int) -> None:
    engine = plan_engine(gpu_bytes=gpu_bytes)
    assert engine.kv_tokens == engine.max_episodes == 0
    assert not engine.can_start


def test_deepstack_has_wider_features_and_input_buffers() -> None:
    engine = plan_engine(model="Qwen3-VL-8B")
    # 16,777,216 pixels of 32 x 32 per visual token, and the features of the merger and three levels.
    assert item_bytes(engine, "encoder cache") == 2 * 16_384 * 4 * 4096
    assert item_bytes(engine, "deepstack buffers") == 2 * 3 * 2048 * 4096
    assert not any(item.name == "deepstack buffers" for item in plan_engine().footprint.items)


def test_linear_attention_layers_take_states_instead_of_tokens() -> None:
    engine = plan_engine(model="Qwen3.5-4B")
    # 8 of 32 layers, keys and values, 4 heads of 256, 2 bytes.
    assert engine.kv_bytes_per_token == 8 * 2 * 4 * 256 * 2
    # 24 layers in groups of 8, two states per group, 528 tokens per block.
    assert engine.state_tokens == 3 * 2 * 528
    assert engine.min_kv_tokens == (-(-32_768 // 528) + 6) * 528
    assert engine.max_episodes == engine.kv_tokens // 528 // (-(-EPISODE_35.tokens // 528) + 6)
    assert engine.max_episodes_shared_prefix > engine.max_episodes


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("model", ["Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B"])
def test_hybrid_layout_matches_vllm(model: str, shards: int) -> None:
    import torch
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec

    text = load_model_shape(model).text
    linear = text.linear
    assert linear is not None
    layout = KvCacheLayout.of(text, 2, shards)
    states = MambaStateShapeCalculator.gated_delta_net_state_shape(
        shards, linear.key_heads, linear.value_heads, linear.key_head_dim, linear.value_head_dim, linear.conv_kernel
    )
    state = MambaSpec(
        block_size=layout.block_tokens, shapes=states, dtypes=(torch.bfloat16, torch.float32), mamba_cache_mode="align"
    )
    assert state.page_size_bytes == layer_state_bytes(linear, 2) // shards
    attention = FullAttentionSpec(
        block_size=layout.block_tokens,
        num_kv_heads=max(1, text.kv_heads // shards),
        head_size=text.head_dim,
        dtype=torch.bfloat16,
    )
    # vLLM takes the smallest multiple of 16 tokens whose page holds a state, and pads the state to it.
    page = attention.page_size_bytes
    assert page - KERNEL_BLOCK_TOKENS * page // layout.block_tokens < state.page_size_bytes <= page
    specs: dict[str, KVCacheSpec] = {
        str(layer): replace(state, page_size_padded=page) if layer in linear.indices else attention
        for layer in range(text.layers)
    }
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    kinds = [isinstance(group.kv_cache_spec, MambaSpec) for group in groups]
    assert (kinds.count(False), kinds.count(True)) == (layout.token_groups, layout.state_groups)
    assert {len(group.layer_names) * page for group in groups} == {layout.block_bytes}
