"""DeepSpeed's configuration and the fused optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.learner.rank_worker import small_config
from vz_ray.learner.distributed import RankInfo, init_distributed
from vz_ray.learner.train_engine import TrainEngine, deepspeed_config


@pytest.mark.parametrize(
    ("device", "world_size", "stage", "overlap"),
    [("cuda", 2, 3, True), ("cuda", 2, 2, True), ("cuda", 2, 1, False), ("cuda", 1, 3, False), ("cpu", 2, 3, False)],
)
def test_communication_overlaps_on_several_gpus(device: str, world_size: int, stage: int, overlap: bool) -> None:
    settings = deepspeed_config(small_config("nowhere", stage), RankInfo(0, world_size, torch.device(device, 0)))
    assert settings["zero_optimization"]["overlap_comm"] is overlap


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_offloaded_states_are_pinned_for_gpus(device: str, pinned: bool) -> None:
    config = small_config("nowhere", 3, offload="all")
    zero = deepspeed_config(config, RankInfo(0, 1, torch.device(device, 0)))["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": pinned}


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (2, "none"), (2, "optimizer"), (3, "all")])
def test_fused_steps_equal_unfused_ones(stage: int, offload: str) -> None:
    config = small_config("nowhere", stage, offload=offload)
    config.optimizer.max_grad_norm, config.optimizer.weight_decay = 0.0, 0.1
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 17))
    inputs = torch.randn(5, 64)
    expected = copy.deepcopy(module)
    engine = TrainEngine(module, config, init_distributed(60.0))
    assert engine.deepspeed.basic_optimizer.param_groups[0]["fused"]
    settings = config.optimizer
    reference = torch.optim.AdamW(
        expected.parameters(),
        settings.learning_rate,
        (settings.beta1, settings.beta2),
        settings.epsilon,
        settings.weight_decay,
        foreach=False,
    )
    for _ in range(3):
        engine.backward(engine(inputs).square().sum())
        engine.step()
        reference.zero_grad()
        expected(inputs).square().sum().backward()
        reference.step()
    with torch.no_grad():
        torch.testing.assert_close(engine(inputs), expected(inputs), rtol=1e-5, atol=1e-6)
