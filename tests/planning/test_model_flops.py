"""FLOP formulas against torch's FlopCounterMode over HF modules, at released sizes on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

from tests.families.hf_configs import build_on_meta, hf_config
from tests.planning.pass_memory import MODEL_TYPES, pack_batch, wide_policy
from vz_ray.config.learner import LoraConfig
from vz_ray.families import FAMILIES, ModelShape, family_of, load_model_shape
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.vision_tower import vision_tables
from vz_ray.planning.model_flops import (
    DELTA_RULE_CHUNK,
    FROZEN_BACKWARD_FACTOR,
    causal_pairs,
    head_flops,
    packed_pairs,
    text_flops,
    vision_flops,
    vision_pairs,
)

GRIDS = [(1, 16, 32), (1, 20, 12), (1, 2, 2)]
"""Full windows, partial windows, and a single visual token."""


SIZES = {
    "qwen2_5_vl": "Qwen2.5-VL-7B",
    "qwen3_vl": "Qwen3-VL-8B",
    "qwen3_vl_moe": "Qwen3-VL-30B-A3B",
    "qwen3_5": "Qwen3.5-4B",
}


@pytest.fixture(scope="module", params=FAMILIES)
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return load_model_shape(SIZES[request.param])


@pytest.fixture(scope="module")
def model(shape: ModelShape) -> Any:
    config = hf_config(shape)
    config._attn_implementation = "eager"
    return with_experts(build_on_meta(config).eval(), "batched_mm")


def with_experts(hf: Any, implementation: str) -> Any:
    """Let experts compute with products that torch counts, unlike grouped ones; the FLOPs are the same."""
    if family_of(hf.config.model_type).read_shape(hf.config).text.experts:
        hf.set_experts_implementation(implementation)
    return hf


def count_flops(call: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def attend_to_all(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Compute all pairs, including masked ones; HF prepares no mask for an attention function that it does not know."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    return ((query @ key.mT * scaling).softmax(-1) @ value).transpose(1, 2), None


def test_text_flops_match_torch(model: Any, shape: ModelShape) -> None:
    AttentionInterface.register("all_pairs", attend_to_all)
    model.model.language_model.config._attn_implementation = "all_pairs"
    # Linear attention is computed in chunks of 64 tokens.
    length = 320
    states = torch.empty(1, length, shape.text.hidden, device="meta")
    positions = torch.empty(3, 1, length, dtype=torch.long, device="meta")

    def call() -> None:
        model.model.language_model(
            inputs_embeds=states,
            position_ids=positions,
            attention_mask={"full_attention": None, "linear_attention": None},
            use_cache=False,
        )

    expected = text_flops(shape, length, length**2)
    if linear := shape.text.linear:
        # torch counts the padded convolution, which the formula omits, and no triangular solves.
        convolution = 2 * (length + linear.conv_kernel - 1) * linear.conv_dim * linear.conv_kernel
        solve = length * linear.value_heads * DELTA_RULE_CHUNK * (linear.key_head_dim + linear.value_head_dim)
        expected += linear.layers * (convolution - solve)
        assert linear.layers * convolution < 0.01 * expected
    assert count_flops(call) == expected


def test_head_flops_match_torch(model: Any, shape: ModelShape) -> None:
    states = torch.empty(7, shape.text.hidden, device="meta")
    assert count_flops(lambda: model.lm_head(states)) == head_flops(shape, 7)


def first_linear_attention_flops(shape: ModelShape, tokens: int) -> int:
    """Return the FLOPs of the first layer without its MLP."""
    text, linear = shape.text, shape.text.linear
    assert linear is not None
    assert 0 in linear.indices
    rest = replace(text, layers=text.layers - 1, linear=replace(linear, indices=linear.indices[1:]))
    layer = text_flops(shape, tokens, 0) - text_flops(replace(shape, text=rest), tokens, 0)
    return layer - 2 * tokens * text.mlp_weights


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_adapter_backward_flops_match_torch(family: str) -> None:
    """torch does not count CPU attention, and the first layer's inputs need no gradients."""
    policy = wide_policy(family, torch.float32, chunk=10**9)
    add_adapters(with_experts(policy.hf, "eager"), LoraConfig(rank=1), family, seed=0)
    batch = pack_batch(policy)
    shape = policy.shape
    logprobs, entropy = policy(batch)
    with FlopCounterMode(display=False) as counter:
        (logprobs.sum() + entropy.sum()).backward()
    tokens = batch.input_ids.numel()
    matrices = text_flops(shape, tokens, 0) + head_flops(shape, int(batch.mask.sum()))
    if shape.text.linear:  # no layer of linear attention has an adapter, so the first layer's needs no backward pass
        matrices -= first_linear_attention_flops(shape, tokens)
    assert counter.get_total_flops() == pytest.approx(FROZEN_BACKWARD_FACTOR * matrices, rel=0.1)


@pytest.mark.parametrize("grid", GRIDS)
def test_vision_flops_match_torch(model: Any, shape: ModelShape, grid: tuple[int, int, int]) -> None:
    visual, array = model.model.visual, np.asarray([grid])
    tables = vision_tables(array, shape, torch.device("cpu"))
    for name in {"position_ids", "interp_indices", "interp_weights"} & tables.keys():
        tables[name] = torch.as_tensor(tables[name]).to("meta")
    patches = grid[1] * grid[2]
    pixels = torch.empty(patches, shape.vision.patch_elements, device="meta")
    flops = count_flops(lambda: visual(pixels, grid_thw=torch.from_numpy(array), **tables))
    assert flops == vision_flops(shape, patches, vision_pairs(shape.vision, *grid[1:]))


def test_packed_pairs_match_an_explicit_mask() -> None:
    prefix, branches = 5, [3, 1, 4]
    owner = [0] * prefix + [k + 1 for k, length in enumerate(branches) for _ in range(length)]
    pairs = sum(owner[key] in (0, owner[query]) for query in range(len(owner)) for key in range(query + 1))
    assert packed_pairs(prefix, branches) == pairs
    assert causal_pairs(5) == packed_pairs(0, [5]) == packed_pairs(5, []) == 15
