"""FLOP formulas against torch's FlopCounterMode over HF modules, at 7B size on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.config.qwen_7b import architecture
from tests.planning.pass_memory import build_on_meta, make_wide_training_data, pack_batch
from vz_ray.config.learner import LoraConfig
from vz_ray.families import ModelShape, model_shape
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.learner.vision_tower import vision_tables
from vz_ray.planning.model_flops import (
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


@pytest.fixture(scope="module")
def model() -> Any:
    config = architecture()
    config._attn_implementation = "eager"
    return build_on_meta(config).eval()


@pytest.fixture(scope="module")
def shape(model: Any) -> ModelShape:
    return model_shape(model.config)


def count_flops(call: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_text_flops_match_torch(model: Any, shape: ModelShape) -> None:
    length = 300
    states = torch.empty(1, length, shape.text.hidden, device="meta")
    positions = torch.empty(3, 1, length, dtype=torch.long, device="meta")

    def call() -> None:
        model.model.language_model(
            inputs_embeds=states,
            position_ids=positions,
            attention_mask={"full_attention": None},
            use_cache=False,
        )

    # Eager attention computes all pairs, including masked ones.
    assert count_flops(call) == text_flops(shape, length, length**2)


def test_head_flops_match_torch(model: Any, shape: ModelShape) -> None:
    states = torch.empty(7, shape.text.hidden, device="meta")
    assert count_flops(lambda: model.lm_head(states)) == head_flops(shape, 7)


def test_adapter_backward_flops_match_torch(tmp_path: Path) -> None:
    """torch does not count CPU attention, and the first layer's inputs need no gradients."""
    data = make_wide_training_data(tmp_path)
    policy = PolicyModel.from_pretrained(data.model, chunk=10**9).train()
    add_adapters(policy.hf, LoraConfig(rank=1), str(data.model), seed=0)
    batch = pack_batch(data, policy)
    shape = policy.shape
    logprobs, entropy = policy(batch)
    with FlopCounterMode(display=False) as counter:
        (logprobs.sum() + entropy.sum()).backward()
    matrices = text_flops(shape, batch.input_ids.numel(), 0) + head_flops(shape, int(batch.mask.sum()))
    assert counter.get_total_flops() == pytest.approx(FROZEN_BACKWARD_FACTOR * matrices, rel=0.1)


@pytest.mark.parametrize("grid", GRIDS)
def test_vision_flops_match_torch(model: Any, shape: ModelShape, grid: tuple[int, int, int]) -> None:
    visual, array = model.model.visual, np.asarray([grid])
    tables = vision_tables(array, shape, torch.device("cpu"))
    tables["position_ids"] = torch.as_tensor(tables["position_ids"]).to("meta")
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
