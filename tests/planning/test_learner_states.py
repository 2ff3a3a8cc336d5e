"""Weights, gradients and optimizer state against what DeepSpeed really holds, with one rank on the CPU."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from vz_ray.config.learner import LearnerConfig
from vz_ray.learner.distributed import init_distributed
from vz_ray.learner.train_engine import TrainEngine
from vz_ray.planning.gpu_memory import Certainty, MemoryPhase
from vz_ray.planning.learner_memory import REDUCE_BUCKET_ELEMENTS, WorstCaseBatch, learner_footprint
from vz_ray.planning.model_shape import KNOWN_SHAPES

SIDE, LAYERS = 600, 4


def storages() -> dict[int, int]:
    """Bytes of every storage that a live tensor of this process has, by address; small ones left out."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        grads = [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    held = [tensor.untyped_storage() for tensor in [*tensors, *grads] if tensor.device.type == "cpu"]
    return {one.data_ptr(): one.nbytes() for one in held if one.nbytes() >= SIDE * SIDE}


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"), (3, "float32")]
)
def test_a_rank_holds_as_many_bytes_a_weight_as_planned(stage: int, dtype: str) -> None:
    config = LearnerConfig(
        zero_stage=stage, dtype=dtype, param_persistence_threshold=0, gradient_checkpointing=False
    )
    kind, before = getattr(torch, dtype), storages()
    layers = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))).to(kind)
    engine = TrainEngine(layers, config, init_distributed(60.0))
    inputs = torch.randn(2, SIDE, dtype=kind)
    engine.backward(engine(inputs).float().square().mean())
    engine.step()
    # Moments are there since the first step, gradients since this pass.
    engine.backward(engine(inputs).float().square().mean())
    found = [size for address, size in storages().items() if address not in before]
    buckets = [size for size in found if size >= 2 * REDUCE_BUCKET_ELEMENTS]
    weights = LAYERS * SIDE**2
    each = (sum(found) - sum(buckets)) / weights
    # A gradient on its way may be one layer's of these four.
    assert planned(config) <= each <= planned(config) + kind.itemsize / LAYERS
    assert buckets == [kind.itemsize * REDUCE_BUCKET_ELEMENTS] * (stage == 3)


def planned(config: LearnerConfig) -> float:
    """Bytes a weight of the exact parts, the bucket left out."""
    shape = KNOWN_SHAPES["Qwen2.5-VL-3B"]
    nothing: Any = WorstCaseBatch(tokens=1, patches=1, sampled_tokens=1, attention_pairs=1, gathered_keys=1.0)
    footprint = learner_footprint(shape, config, nothing, 1, has_reference=False)
    exact = [
        part
        for part in footprint.items
        if part.certainty is Certainty.EXACT and part.phase is not MemoryPhase.OPTIMIZER_STEP
    ]
    return sum(part.bytes for part in exact if "bucket" not in part.name) / shape.parameters
