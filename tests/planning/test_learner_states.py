"""Planned weights, gradients and optimizer states against DeepSpeed's with one rank on the CPU."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from vz_ray.config.learner import LearnerConfig
from vz_ray.families import load_model_shape
from vz_ray.learner.distributed import init_distributed
from vz_ray.learner.train_engine import TrainEngine
from vz_ray.planning.gpu_memory import Certainty, MemoryPhase
from vz_ray.planning.learner_activations import WorstCaseBatch
from vz_ray.planning.learner_memory import REDUCE_BUCKET_ELEMENTS, learner_footprint

pytestmark = pytest.mark.integration

SIDE, LAYERS = 600, 4


def live_storages() -> dict[int, int]:
    """Return the bytes of the storages of all live CPU tensors by address, without small ones."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        grads = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in [*tensors, *grads] if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes() >= SIDE * SIDE}


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"), (3, "float32")]
)
def test_state_bytes_per_weight_match_the_plan(stage: int, dtype: str) -> None:
    config = LearnerConfig(zero_stage=stage, dtype=dtype, param_persistence_threshold=0, gradient_checkpointing=False)
    torch_dtype, before = getattr(torch, dtype), live_storages()
    layers = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))).to(torch_dtype)
    engine = TrainEngine(layers, config, init_distributed(60.0))
    inputs = torch.randn(2, SIDE, dtype=torch_dtype)
    engine.backward(engine(inputs).float().square().mean())
    engine.step()
    # The first step allocated the moments, this pass allocates the gradients.
    engine.backward(engine(inputs).float().square().mean())
    sizes = [size for address, size in live_storages().items() if address not in before]
    buckets = [size for size in sizes if size >= 2 * REDUCE_BUCKET_ELEMENTS]
    weights = LAYERS * SIDE**2
    bytes_per_weight = (sum(sizes) - sum(buckets)) / weights
    planned = planned_bytes_per_weight(config)
    # An unreduced gradient takes at most one of the four layers.
    assert planned <= bytes_per_weight <= planned + torch_dtype.itemsize / LAYERS
    assert buckets == [torch_dtype.itemsize * REDUCE_BUCKET_ELEMENTS] * (stage == 3)


def planned_bytes_per_weight(config: LearnerConfig) -> float:
    """Return the planned bytes per weight of the exact items, without the bucket."""
    shape = load_model_shape("Qwen2.5-VL-3B")
    batch: Any = WorstCaseBatch(tokens=1, patches=1, sampled_tokens=1, attention_pairs=1, gathered_keys=1.0)
    footprint = learner_footprint(shape, config, batch, 1, has_reference=False)
    exact = [
        item
        for item in footprint.items
        if item.certainty is Certainty.EXACT and item.phase is not MemoryPhase.OPTIMIZER_STEP
    ]
    return sum(item.bytes for item in exact if "bucket" not in item.name) / shape.parameters
