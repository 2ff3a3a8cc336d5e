"""What is trained, counted from shapes, against real policies with adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.learner.lora import adapt
from vz_ray.learner.model import Policy
from vz_ray.plan.shape import ModelShape
from vz_ray.plan.trained import linear_layers, trained_of

TINY = Path("assets/tiny-base")
TEXT = LoraConfig().targets


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=4, vision=True),
        LoraConfig(rank=3, targets=["v_proj", "qkv"]),
        LoraConfig(rank=8, targets=[*TEXT, r"merger\.mlp\.\d", r"blocks\.[01]\.mlp\.down_proj"], vision=True),
        LoraConfig(rank=2, targets=[".*"]),
    ],
    ids=["text", "merger", "both", "adapted-merger", "all"],
)
def test_elements_are_those_of_a_policy_with_adapters(lora: LoraConfig) -> None:
    hf = Policy.load(TINY).hf
    shape = ModelShape.of_config(hf.config)
    linear = {name: m for name, m in hf.named_modules() if isinstance(m, nn.Linear)}
    sides = {name: (m.in_features, m.out_features) for name, m in linear.items()}
    assert dict(linear_layers(shape)) == sides
    adapt(hf, lora, str(TINY), seed=0)
    learning = {name: p.numel() for name, p in hf.named_parameters() if p.requires_grad}
    vision = sum(count for name, count in learning.items() if ".visual." in name)
    found = trained_of(shape, LearnerConfig(lora=lora))
    assert (found.text, found.vision) == (sum(learning.values()) - vision, vision)
    assert found.held == sum(p.numel() for p in hf.parameters())
    assert found.largest == max(learning.values())
