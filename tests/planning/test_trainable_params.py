"""What is trained, counted from shapes, against real policies with adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.planning.model_shape import ModelShape
from vz_ray.planning.trainable_params import adaptable_layers, count_trainable_params

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
def test_elements_are_those_of_a_policy_with_adapters(lora: LoraConfig) -> None:
    hf = PolicyModel.from_pretrained(TINY).hf
    shape = ModelShape.from_hf_config(hf.config)
    linear = {name: m for name, m in hf.named_modules() if isinstance(m, nn.Linear)}
    sides = {name: (m.in_features, m.out_features) for name, m in linear.items()}
    assert dict(adaptable_layers(shape)) == sides
    add_adapters(hf, lora, str(TINY), seed=0)
    learning = {name: p.numel() for name, p in hf.named_parameters() if p.requires_grad}
    vision = sum(count for name, count in learning.items() if ".visual." in name)
    found = count_trainable_params(shape, LearnerConfig(lora=lora))
    assert (found.text, found.vision) == (sum(learning.values()) - vision, vision)
    assert found.total == sum(p.numel() for p in hf.parameters())
    assert found.largest_tensor == max(learning.values())
