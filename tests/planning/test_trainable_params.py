"""Trainable parameter counts against real policies with LoRA adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.families import FAMILIES, model_shape
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.planning.trainable_params import count_trainable_params

TINY = Path("assets/tiny-base")
TEXT = LoraConfig().target_modules


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=4, train_merger=True),
        LoraConfig(rank=3, target_modules=["v_proj", "qkv"]),
        LoraConfig(
            rank=8,
            target_modules=[*TEXT, r"merger\.mlp\.\d", r"blocks\.[01]\.mlp\.down_proj"],
            train_merger=True,
        ),
        LoraConfig(rank=2, target_modules=[".*"]),
    ],
    ids=["text", "merger", "both", "adapted-merger", "all"],
)
def test_counts_match_a_policy_with_adapters(lora: LoraConfig) -> None:
    hf = PolicyModel.from_pretrained(TINY).hf
    shape = model_shape(hf.config)
    linear = {name: m for name, m in hf.named_modules() if isinstance(m, nn.Linear)}
    sizes = {name: (m.in_features, m.out_features) for name, m in linear.items()}
    assert dict(FAMILIES[shape.model_type].linear_layers(shape)) == sizes
    add_adapters(hf, lora, str(TINY), seed=0)
    trainable = {name: p.numel() for name, p in hf.named_parameters() if p.requires_grad}
    vision = sum(count for name, count in trainable.items() if ".visual." in name)
    counts = count_trainable_params(shape, LearnerConfig(lora=lora))
    assert (counts.text, counts.vision) == (sum(trainable.values()) - vision, vision)
    assert counts.total == sum(p.numel() for p in hf.parameters())
    assert counts.largest_tensor == max(trainable.values())
